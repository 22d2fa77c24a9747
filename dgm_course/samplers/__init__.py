r"""Samplers: plain functions of (denoiser, path, x, times) that return the states on the way from noise to data.

`ddpm`, `ddim`, `euler_maruyama` and the corrector move by
:math:`x_s = \text{keep}\cdot x_t + \text{pull}\cdot\hat x_0 + \text{std}\cdot z`; the second-order solvers draw no noise and add one
more x̂_0. The coefficients depend on the path and the grid of times alone, so they are worked out once, in float64; what is
left for a step is a multiplication and an addition.
"""

from dgm_course.samplers.ancestral import ddpm, ddpm_step
from dgm_course.samplers.dpm_solver import (
    dpm_solver_pp_2m,
    dpm_solver_pp_2m_step,
    dpm_solver_pp_2s,
    dpm_solver_pp_2s_step,
)
from dgm_course.samplers.grid import checked_grid, last, logsnr_times
from dgm_course.samplers.ode import ddim, ddim_inversion, ddim_step, heun, heun_step
from dgm_course.samplers.overshoot import overshoot, overshoot_step
from dgm_course.samplers.parallel import picard
from dgm_course.samplers.sde import (
    euler_maruyama,
    euler_maruyama_step,
    forward_euler_maruyama,
    langevin,
    langevin_step,
    predictor_corrector,
)

__all__ = [
    "checked_grid",
    "ddim",
    "ddim_inversion",
    "ddim_step",
    "ddpm",
    "ddpm_step",
    "dpm_solver_pp_2m",
    "dpm_solver_pp_2m_step",
    "dpm_solver_pp_2s",
    "dpm_solver_pp_2s_step",
    "euler_maruyama",
    "euler_maruyama_step",
    "forward_euler_maruyama",
    "heun",
    "heun_step",
    "langevin",
    "langevin_step",
    "last",
    "logsnr_times",
    "overshoot",
    "overshoot_step",
    "picard",
    "predictor_corrector",
]
