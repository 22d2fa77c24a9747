"""The language model: nothing looks ahead, torch's own transformer says the same, and what is drawn is softmax(ℓ/τ)."""

import numpy as np
import pytest
import torch
from oracles import typed_attention
from scipy import stats
from torch import nn

from dgm_course.nets import LanguageModel
from dgm_course.nets.language import CausalAttention, generate, later

SMALL = {"width": 16, "depth": 2, "heads": 2, "length": 12}


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from one seed and leaves the global random state as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def lively(net: nn.Module) -> nn.Module:
    """The net in float64, with weights as large as trained ones."""
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net.double().eval()


def bytes_of(*shape) -> torch.Tensor:
    return torch.randint(256, shape)


class Stub(nn.Module):
    """A model whose logits are a function of the last byte, and which remembers what it was shown."""

    def __init__(self, logits, length: int = 5):
        super().__init__()
        self.table, self.length, self.logits, self.shown = nn.Embedding(256, 1), length, logits, []

    def forward(self, x):
        self.shown.append(bytes(x[0].tolist()))
        return torch.stack([self.logits(byte) for byte in x[0].tolist()])[None]


def among(weights: dict[str, float]) -> torch.Tensor:
    """Logits under which only these characters can be drawn."""
    logits = torch.full((256,), -torch.inf)
    for character, value in weights.items():
        logits[ord(character)] = value
    return logits


# Who may look at whom -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [1, 2, 5])
@pytest.mark.parametrize("before", [0, 1, 4])
def test_later(queries, before):
    """Hidden are the keys after a query's own, counted from the end of the keys, by loops."""
    hidden = later(queries, before + queries)
    assert hidden.dtype == torch.bool
    assert hidden.tolist() == [[key > before + query for key in range(before + queries)] for query in range(queries)]


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("length", [1, 5])
def test_causal_attention(heads, length):
    """Weights and output by loops, and those of torch's own module under its mask; the first token sees itself alone."""
    attention, h = lively(CausalAttention(12, heads)), torch.randn(2, length, 12, dtype=torch.float64)
    weights, out = typed_attention(attention, h, causal=True)
    torch.testing.assert_close(attention.weights(h), weights, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(attention(h), out, rtol=1e-12, atol=1e-12)
    assert torch.equal(attention.weights(h).triu(1), torch.zeros_like(weights)) and (weights[:, :, 0, 0] == 1).all()
    theirs = nn.MultiheadAttention(12, heads, batch_first=True).double()
    parts = (attention.query, attention.key, attention.value)
    theirs.load_state_dict({
        "in_proj_weight": torch.cat([part.weight for part in parts]),
        "in_proj_bias": torch.cat([part.bias for part in parts]),
        "out_proj.weight": attention.out.weight,
        "out_proj.bias": attention.out.bias,
    })  # fmt: skip
    mask = nn.Transformer.generate_square_subsequent_mask(length, dtype=torch.float64)
    torch.testing.assert_close(attention(h), theirs(h, h, h, attn_mask=mask)[0], rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_no_byte_looks_ahead():
    """Another byte changes no logits before its place, and all from its place on; so a beginning says what the whole says there."""
    net, x = lively(LanguageModel(**SMALL)), bytes_of(3, 12)
    whole = net(x)
    assert whole.shape == (3, 12, 256)
    for place in range(12):
        other = x.clone()
        other[:, place] = (other[:, place] + 1) % 256
        changed = (net(other) - whole).abs().amax((0, 2))
        assert (changed[:place] < 1e-12).all() and (changed[place:] > 1e-3).all()
        torch.testing.assert_close(net(x[:, : place + 1]), whole[:, : place + 1], rtol=1e-11, atol=1e-11)


def test_the_slope_is_causal():
    """The logits at n have a slope in the embedding of byte m if m ≤ n, and exactly none if m > n."""
    net, x = lively(LanguageModel(**SMALL)), bytes_of(1, 6)
    table = net.table(x).detach().requires_grad_()
    net.table.register_forward_hook(lambda *_: table)
    out = net(x)
    for n in range(6):
        (slope,) = torch.autograd.grad(out[0, n].square().sum(), table, retain_graph=True)
        assert (slope[0].abs().sum(1) > 1e-6).tolist() == [m <= n for m in range(6)]
        assert not slope[0, n + 1 :].any()


# The whole model ------------------------------------------------------------------------------------------------------


def test_torchs_transformer_says_the_same():
    """A stack of torch's own layers, norm first, with the same weights and a causal mask; tables added, a norm and a map at the end."""
    width, heads, ratio = 12, 3, 2.5
    net, x = lively(LanguageModel(width, 2, heads, ratio, length=9)), bytes_of(2, 7)
    gelu = nn.GELU("tanh")
    mask = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64)
    h = nn.functional.one_hot(x, 256).double() @ net.table.weight + net.positions.weight[:7]
    for block in net.blocks:
        own = block.state_dict()
        theirs = nn.TransformerEncoderLayer(width, heads, 30, 0.0, gelu, 1e-6, True, True, dtype=torch.float64)
        theirs.load_state_dict({
            f"{name}.{part}": own[f"{mine}.{part}"]
            for name, mine in {
                "self_attn.out_proj": "attention.out", "linear1": "perceptron.0", "linear2": "perceptron.2",
                "norm1": "norm1", "norm2": "norm2",
            }.items()
            for part in ("weight", "bias")
        } | {
            f"self_attn.in_proj_{part}": torch.cat([own[f"attention.{name}.{part}"] for name in ("query", "key", "value")])
            for part in ("weight", "bias")
        })  # fmt: skip
        h = theirs(h, src_mask=mask)
    h = nn.functional.layer_norm(h, (width,), net.norm.weight, net.norm.bias, 1e-5)
    torch.testing.assert_close(net(x), h @ net.leave.weight.T + net.leave.bias, rtol=1e-11, atol=1e-11)


def test_every_parameter_learns():
    """All have a slope, but a key's bias, which a softmax does not feel, and positions and bytes that do not come in the text."""
    net = lively(LanguageModel(**SMALL))
    x = bytes_of(3, 7)
    nn.functional.cross_entropy(net(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()).backward()
    for name, parameter in net.named_parameters():
        assert name.endswith("key.bias") or parameter.grad.abs().max() > 1e-9, name
    assert (net.positions.weight.grad.abs().sum(1) > 0).tolist() == [n < 6 for n in range(12)]
    assert (net.table.weight.grad.abs().sum(1) > 0).nonzero().flatten().tolist() == x[:, :-1].unique().tolist()


def test_at_the_start():
    """The model of the course has 0.7 to 0.9 million parameters; the tables are Gaussian with deviation 0.02, bytes about as likely."""
    net = LanguageModel()
    assert 700_000 < sum(p.numel() for p in net.parameters()) < 900_000
    assert (len(net.blocks), net.length, net.leave.weight.shape) == (4, 128, (256, 128))
    for table, rows in ((net.table, 256), (net.positions, 128)):
        assert table.weight.shape == (rows, 128)
        assert stats.kstest(table.weight.detach().flatten().numpy() / 0.02, "norm").pvalue > 1e-3
    x = bytes_of(2, 128)
    loss = nn.functional.cross_entropy(net(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
    assert abs(loss.item() - np.log(256)) < 0.5


@pytest.mark.parametrize("x, told", [
    (torch.zeros(2, 3), r"torch.float32 of shape \(2, 3\)"),
    (torch.zeros(2, 3, dtype=torch.int32), r"torch.int32 of shape \(2, 3\)"),
    (torch.zeros(3, dtype=torch.int64), r"torch.int64 of shape \(3,\)"),
    (torch.zeros(1, 2, 3, dtype=torch.int64), r"torch.int64 of shape \(1, 2, 3\)"),
    (torch.zeros(2, 13, dtype=torch.int64), r"torch.int64 of shape \(2, 13\)"),
    (torch.zeros(2, 0, dtype=torch.int64), r"torch.int64 of shape \(2, 0\)"),
])  # fmt: skip
def test_what_is_read_is_checked(x, told):
    """Another type or shape, no byte, or more than it can read: the error says what is asked and what came."""
    with pytest.raises(ValueError, match=rf"^x must be int64 of shape \(B, N\), N from 1 to 12; got {told}"):
        LanguageModel(**SMALL)(x)


# Writing on -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_without_temperature_it_takes_the_likeliest():
    """Byte by byte the largest logit, by a loop over windows of the last bytes, also when the text outgrows the window."""
    net, text = lively(LanguageModel(**SMALL)), list(b"Once")
    for _ in range(20):
        text.append(int(net(torch.tensor([text[-12:]]))[0, len(text[-12:]) - 1].numpy().argmax()))
    found = generate(net, "Once", 20, temperature=0)
    assert found == bytes(text).decode(errors="replace")
    assert found == generate(net, "Once", 20, temperature=0.0, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_what_is_drawn_is_softmax(temperature):
    """How often each letter comes is ∝ e^(ℓ/τ), by a χ² test; each draw depends on the byte before it alone."""
    logits = {"a": 0.0, "b": 1.0, "c": -0.5}
    net = Stub(lambda byte: among(logits))
    drawn = generate(net, "a", 3000, temperature=temperature, generator=torch.Generator().manual_seed(3))[1:]
    share = np.exp(np.array(list(logits.values())) / temperature)
    assert stats.chisquare([drawn.count(letter) for letter in logits], 3000 * share / share.sum()).pvalue > 1e-3
    cycle = {ord("a"): "b", ord("b"): "c", ord("c"): "a"}
    assert generate(Stub(lambda byte: among({cycle[byte]: 0.0})), "a", 6) == "abcabca"


@torch.no_grad()
def test_a_generator_makes_it_reproducible():
    """The same seed writes the same text and leaves the global source alone; another seed, or another temperature, another text."""
    net = lively(LanguageModel(**SMALL))

    def text(seed, temperature=1.0):
        return generate(net, "To", 30, temperature=temperature, generator=torch.Generator().manual_seed(seed))

    before = torch.random.get_rng_state()
    assert text(1) == text(1) != text(2) and text(1) != text(1, 3.0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert generate(net, "To", 30) != generate(net, "To", 30)


def test_the_model_is_shown_the_last_bytes():
    """Prompt and all that was drawn, or as much of its end as the model can read; of a long prompt too."""
    net = Stub(lambda byte: among({"x": 0.0}), length=4)
    assert generate(net, "ab", 5) == "abxxxxx"
    assert net.shown == [b"ab", b"abx", b"abxx", b"bxxx", b"xxxx"]
    net.shown.clear()
    assert generate(net, "abcdefg", 1) == "abcdefgx" and net.shown == [b"defg"]
    assert generate(net, "é", 0) == "é" and len(net.shown) == 1
    assert generate(net, "é", 1) == "éx" and net.shown[-1] == "é".encode()


def test_what_is_no_text_becomes_a_mark():
    """A lone byte of a longer character is written as �, and the rest stays."""
    logits = torch.full((256,), -torch.inf)
    logits[0xC3] = 0.0
    assert generate(Stub(lambda byte: logits), "ab", 2) == "ab\ufffd\ufffd"


def test_writing_takes_no_gradient():
    """No graph is built: a model that is in training can be looked at."""
    net = lively(LanguageModel(**SMALL))
    seen = []
    net.leave.register_forward_hook(lambda module, given, out: seen.append(out.requires_grad))
    generate(net, "a", 2)
    assert seen == [False, False]


@pytest.mark.parametrize("settings, message", [
    ({"prompt": ""}, "^prompt must not be empty; got ''"),
    ({"temperature": -0.1}, "^temperature must be at least 0; got -0.1"),
])  # fmt: skip
def test_writing_checks_its_arguments(settings, message):
    """An empty prompt and a negative temperature are refused, and named."""
    with pytest.raises(ValueError, match=message):
        generate(LanguageModel(**SMALL), **{"prompt": "a", "number": 1} | settings)
