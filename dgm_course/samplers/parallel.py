"""Parallel sampling: all steps of a sampler at once, again and again, until nothing changes any more."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dgm_course.paths.base import GaussianPath
from dgm_course.samplers.grid import checked_grid, coefficient_rows, noise_like
from dgm_course.samplers.ode import ddim_coefficients

__all__ = ["picard"]


def picard(
    denoiser: Callable,
    path: GaussianPath,
    x: Tensor,
    times,
    *,
    window: int | None = None,
    tol: float = 1e-3,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    r"""DDIM as a fixed-point problem: guess the whole way, ask the denoiser at all of its times at once, walk it anew, repeat.

    .. math:: x^{(k+1)}_{i+1} = \text{keep}_i\,x^{(k+1)}_i + \text{pull}_i\,\hat x_0\bigl(x^{(k)}_i, t_i\bigr) + \text{std}_i\,z_i

    A way that a round leaves as it is, is that of `ddim` with the same noises. After k rounds the first k states are `ddim`'s exactly, so
    as many rounds as steps are always enough; mostly far fewer are. A round is one call of the denoiser with many samples: few rounds
    are few calls one after the other, at the price of more evaluations in all. (The paper takes the whole step from the old way; here
    the part without the network is renewed within a round.)

    Arguments:
        denoiser: (x_t, t) → x̂_0. It is asked with W·B samples, all of one time after all of another, and t of shape (W·B,). What it is
            conditioned on must follow, as in `lambda x, t: d(x, t, y=labels.repeat(len(x) // len(labels)))`.
        path: The Gaussian path.
        x: The first state, at times[0], shape (B, …).
        times: Strictly descending, shape (N + 1,).
        window: W, the steps in a round; all N if not given. The window moves on over states that are done.
        tol: A state is done when a round has moved it, and those before it, by at most so much: root mean square over the values of
            the sample that moved most.
        eta: DDIM's share of fresh noise. All of it is drawn first, in the order of the steps.
        generator: Source of the noise.

    Returns:
        An iterator over the rounds: the state at the end of the way so far, shape (B, …). The last is the sample.

    Raises:
        ValueError, TypeError: At the call, if an argument does not fit.
        FloatingPointError: In the round in which a state is not finite.

    Source:
        | Slide "Open Research Question in Diffusion"; Parallel Sampling of Diffusion Models (Shih et al., 2023), Algorithm 1

    Example:
        >>> from dgm_course.paths import Cosine
        >>> rounds = list(picard(lambda xt, t: torch.ones_like(xt), Cosine(), torch.randn(4, 2), Cosine().times(50)))
        >>> len(rounds), rounds[-1].unique()
        (2, tensor([1.]))
    """
    times = checked_grid(path, x, times)
    table = coefficient_rows(x, times, ddim_coefficients(path, times[:-1], times[1:], eta))
    window = len(table) if window is None else window
    if not (isinstance(window, int) and window >= 1):
        raise ValueError(f"window must be a whole number of at least 1; got {window!r}")
    if not tol >= 0:
        raise ValueError(f"tol must not be negative; got {tol}")
    return _rounds(denoiser, x, table, window, tol, generator)


@torch.no_grad()
def _rounds(denoiser, x, table, window, tol, generator):
    fresh = [std * noise_like(x, generator) if std else None for *_, std in table]
    way, done, number = [x] * (len(table) + 1), 0, 0
    while done < len(table):
        number += 1
        ahead = range(done, min(done + window, len(table)))
        t = torch.tensor([table[i][0] for i in ahead], dtype=torch.float64).repeat_interleave(len(x)).to(x.device)
        guesses = denoiser(torch.cat([way[i] for i in ahead]), t).split(len(x))  # the one call of this round
        moved = []
        for i, x0 in zip(ahead, guesses, strict=True):
            _t, _s, keep, pull, _std = table[i]
            new = way[i].mul(keep).add_(x0, alpha=pull)
            if fresh[i] is not None:
                new.add_(fresh[i])
            moved.append((new - way[i + 1]).square().flatten(1).mean(1).max().sqrt().item())
            way[i + 1] = new
        if not all(m < float("inf") for m in moved):
            raise FloatingPointError(f"a state is not finite in round {number}, between t = {t[0]:g} and {t[-1]:g}")
        way[ahead.stop + 1 :] = [new] * (len(table) - ahead.stop)  # what lies beyond starts from the last state
        done += (
            1  # the first state is exact; those after it were asked at old places, and count while no place has moved
        )
        while done < ahead.stop and max(moved[: done - ahead.start + 1]) <= tol:
            done += 1
        yield new.clone()
