"""LoRA and prefixes against Hugging Face peft, on models of transformers and on our own: logits within 1e-5 in float32, files both ways.

Where the conventions differ:
- Their models are wrapped, so their names of layers begin with base_model.model; in their files the name of the update is left out,
  and one that is not called "default" has a folder of its own inside.
- Their A of a convolution has its base's kernel, stride and padding, but neither its dilation nor its way of padding: unmerged it says
  something else there, or cannot be added at all. Merged it is ours.
- Their weighted sum of updates by "cat" puts A above A and B beside B: one update of both ranks, which is our sum.
- Their prefix goes to a model of transformers as a cache of keys and values of tokens that are no longer there. So a model with learned
  positions goes on at P, where ours begins at 0: its table of positions is ours, P places later. Its linear maps are stored transposed.
"""

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dgm_course.nets import DiT, LanguageModel
from dgm_course.peft import Prefix, activate, add_lora, add_prefix, fold, load_lora, merged, save_lora, trainable

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of theirs, about theirs

IDS = torch.randint(64, (2, 7), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from one seed and leaves the global random state as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def agree(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, theirs.abs().max().item()))


def lively(model: nn.Module) -> nn.Module:
    """The model with weights that make its attention far from even."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


class Picture(nn.Module):
    """Convolutions of several kinds and a linear layer."""

    def __init__(self, **settings):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, stride=2, **settings)
        self.third, self.head = nn.Conv2d(6, 4, 1, bias=False), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.third(torch.tanh(self.second(torch.tanh(self.first(x))))).mean((2, 3)))


def llama(**more) -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4} | more
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes))


def logits(model: nn.Module, *given) -> torch.Tensor:
    """What a model says, be it ours or one of transformers."""
    out = model(*given)
    return out if isinstance(out, torch.Tensor) else out.logits


TOLD = (torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.2, 0.9]))
MODELS = {
    "Llama": (llama, ("q_proj", "v_proj", "down_proj"), (IDS,), 6),
    "convolutions": (Picture, ("first", "second", "third", "head"), (IMAGES,), 4),
    "language": (lambda: LanguageModel(16, 2, 2, length=9), ("query", "attention.out", "perceptron.0"), (IDS,), 6),
    "DiT": (lambda: DiT(size=8, width=16, depth=2, heads=2), ("key", "modulation", "perceptron.2"), TOLD, 7),
}
all_models = pytest.mark.parametrize("make, targets, given, count", MODELS.values(), ids=MODELS)
both_scales = pytest.mark.parametrize("stable", [False, True], ids=["α/r", "α/√r"])


def theirs_of(base: nn.Module, targets, stable: bool = False, **more) -> PeftModel:
    """Their model around a copy of the base, with random A and B."""
    settings = {"r": 3, "lora_alpha": 5, "use_rslora": stable, "init_lora_weights": False} | more
    return get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=list(targets), **settings)).eval()


# LoRA -----------------------------------------------------------------------------------------------------------------


@all_models
@both_scales
def test_we_read_their_file(make, targets, given, count, stable, tmp_path):
    """On a copy of the base the logits are theirs, those of the base without the update too; A and B are theirs bit by bit."""
    base = lively(make())
    theirs = theirs_of(base, targets, stable)
    theirs.save_pretrained(tmp_path)
    ours = load_lora(copy.deepcopy(base), tmp_path, "read")
    agree(logits(ours, *given), logits(theirs, *given))
    assert (logits(ours, *given) - logits(base, *given)).abs().max() > 1e-2
    assert torch.equal(logits(activate(ours), *given), logits(base, *given))
    with theirs.disable_adapter():
        agree(logits(ours, *given), logits(theirs, *given))
    state = theirs.state_dict()
    assert len(trainable(ours)) == 2 * count == sum(".lora_" in name for name in state)
    for name, value in trainable(ours).items():
        for mine, its in ((".down.read.", ".lora_A.default."), (".up.read.", ".lora_B.default.")):
            assert mine not in name or torch.equal(value, state[f"base_model.model.{name.replace(mine, its)}"])


@all_models
def test_they_read_our_file(make, targets, given, count, tmp_path):
    """With their loader around a copy of the base, the logits are ours; and what they write of it has our keys and our numbers."""
    base = lively(make())
    ours = add_lora(copy.deepcopy(base), targets, rank=2, alpha=3.0, name="bold")
    for parameter in trainable(ours).values():
        nn.init.normal_(parameter, std=0.2)
    file = save_lora(ours, tmp_path / "ours", "bold")
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    agree(logits(ours, *given), logits(theirs, *given))
    theirs.save_pretrained(tmp_path / "back")
    mine, its = load_file(file), load_file(tmp_path / "back" / file.name)
    assert (
        mine.keys() == its.keys() and len(mine) == 2 * count and all(torch.equal(mine[key], its[key]) for key in mine)
    )
    agree(logits(load_lora(copy.deepcopy(base), tmp_path / "back"), *given), logits(ours, *given))


@all_models
@both_scales
def test_merged_models(make, targets, given, count, stable, tmp_path):
    """Their merge_and_unload and our `merged` are the same model: names, weights and logits."""
    base = lively(make())
    theirs = theirs_of(base, targets, stable)
    theirs.save_pretrained(tmp_path)
    ours, theirs = merged(load_lora(copy.deepcopy(base), tmp_path)), theirs.merge_and_unload()
    mine, its = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == its.keys() == base.state_dict().keys()
    for name in mine:
        agree(mine[name].float(), its[name].float())
    agree(logits(ours, *given), logits(theirs, *given))


@all_models
def test_several_updates(make, targets, given, count, tmp_path):
    """Two of theirs on one base, of other ranks and scales: switched, and added with weights."""
    base = lively(make())
    theirs = theirs_of(base, targets)
    theirs.add_adapter("thin", LoraConfig(target_modules=list(targets[:2]), r=2, lora_alpha=7, init_lora_weights=False))
    theirs.add_weighted_adapter(["default", "thin"], [0.3, 0.7], "both", combination_type="cat")
    theirs.save_pretrained(tmp_path)
    ours = load_lora(load_lora(copy.deepcopy(base), tmp_path, "bold"), tmp_path / "thin", "thin")
    for name, weights in {"default": {"bold": 1.0}, "thin": {"thin": 1.0}, "both": {"bold": 0.3, "thin": 0.7}}.items():
        theirs.set_adapter(name)
        agree(logits(activate(ours, **weights), *given), logits(theirs.eval(), *given))


@pytest.mark.parametrize("settings", [
    {"padding": 2, "dilation": 2}, {"padding": 1, "padding_mode": "circular"}, {"padding": (0, 1)}
], ids=str)  # fmt: skip
def test_convolutions_of_other_kinds(settings, tmp_path):
    """Dilated and padded otherwise, merged is the same; ours says it unmerged too."""
    base = lively(Picture(**settings))
    theirs = theirs_of(base, ("first", "second"))
    theirs.save_pretrained(tmp_path)
    ours, theirs = load_lora(copy.deepcopy(base), tmp_path), theirs.merge_and_unload()
    agree(ours(IMAGES), theirs(IMAGES))
    agree(merged(ours)(IMAGES), theirs(IMAGES))


def test_their_start_is_ours(tmp_path):
    """A new update of theirs changes nothing either, and the same slopes reach A and B."""
    base = lively(llama())
    theirs = theirs_of(base, ("q_proj", "o_proj"), init_lora_weights="gaussian")
    theirs.save_pretrained(tmp_path)
    ours = load_lora(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(ours, IDS), logits(base, IDS)) and torch.equal(logits(theirs, IDS), logits(base, IDS))
    for step in range(2):
        for model in (ours, theirs):
            model.zero_grad()
            nn.functional.cross_entropy(logits(model, IDS).flatten(0, 1), IDS.flatten()).backward()
        slopes = dict(theirs.named_parameters())
        for name, value in trainable(ours).items():
            its = slopes[f"base_model.model.{name}".replace(".down.", ".lora_A.").replace(".up.", ".lora_B.")]
            agree(value.grad, its.grad)
            assert bool(value.grad.any()) == (step == 1 or ".up." in name)
            with torch.no_grad():
                value -= 0.1 * value.grad
                its -= 0.1 * its.grad


MORE = {
    "DoRA": {"use_dora": True},
    "biases": {"bias": "all"},
    "biases of LoRA": {"bias": "lora_only"},
    "a bias for B": {"lora_bias": True},
    "ranks": {"rank_pattern": {"q_proj": 2}},
    "scales": {"alpha_pattern": {"q_proj": 2}},
    "a whole layer": {"modules_to_save": ["lm_head"]},
    "rows of a table": {"trainable_token_indices": {"embed_tokens": [1, 2]}},
    "begun from the base": {"init_lora_weights": "pissa"},
    "begun from its QR": {"init_lora_weights": "olora"},
    "a table": {"target_modules": ["q_proj", "embed_tokens"]},
}


@pytest.mark.parametrize("more", MORE.values(), ids=MORE)
def test_files_with_more_than_lora(more, tmp_path):
    """Written by peft itself; what would be read wrong is refused, and the base is as before."""
    base = lively(llama())
    targets = more.get("target_modules", ("q_proj", "v_proj"))
    theirs_of(base, targets, **{key: value for key, value in more.items() if key != "target_modules"}).save_pretrained(
        tmp_path
    )
    before = logits(base, IDS)
    with pytest.raises(ValueError, match="must hold"):
        load_lora(base, tmp_path)
    assert torch.equal(logits(base, IDS), before) and all(parameter.requires_grad for parameter in base.parameters())


def test_a_file_of_another_method(tmp_path):
    """IA³ scales activations; its file is no LoRA."""
    settings = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    get_peft_model(llama(), IA3Config(**settings)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must hold a plain LoRA; got IA3"):
        load_lora(llama(), tmp_path)


def test_their_file_on_another_base(tmp_path):
    """Without a print of the base, names and shapes of the layers tell."""
    theirs_of(llama(), ("q_proj",)).save_pretrained(tmp_path)
    for other in (LanguageModel(16, 2, 2, length=9), llama(hidden_size=24)):
        with pytest.raises(ValueError, match="was trained on another base"):
            load_lora(other, tmp_path)


# Prefix tuning --------------------------------------------------------------------------------------------------------


def gpt2(ours: LanguageModel, skipped: int = 0) -> GPT2LMHeadModel:
    """Theirs with the weights of ours, whose last map has no bias; its positions begin `skipped` places later."""
    blocks, inside = len(ours.blocks), ours.blocks[0]
    sizes = {"n_embd": ours.table.embedding_dim, "n_layer": blocks, "n_head": inside.attention.heads}
    sizes |= {"n_inner": inside.perceptron[0].out_features, "n_positions": ours.length + skipped, "vocab_size": 256}
    theirs = GPT2LMHeadModel(GPT2Config(tie_word_embeddings=False, layer_norm_epsilon=1e-6, **sizes)).eval()
    state, own = theirs.state_dict(), ours.state_dict()
    maps = {"attn.c_proj": "attention.out", "mlp.c_fc": "perceptron.0", "mlp.c_proj": "perceptron.2"}
    for part in ("weight", "bias"):
        state[f"transformer.ln_f.{part}"] = own[f"norm.{part}"]
        for n in range(blocks):
            mine, its = f"blocks.{n}.", f"transformer.h.{n}."
            both = [own[f"{mine}attention.{name}.{part}"] for name in ("query", "key", "value")]
            values = {"attn.c_attn": torch.cat(both)} | {
                one: own[f"{mine}{other}.{part}"] for one, other in maps.items()
            }
            for one, value in values.items():
                state[f"{its}{one}.{part}"] = value.mT if part == "weight" else value
            for k in (1, 2):
                state[f"{its}ln_{k}.{part}"] = own[f"{mine}norm{k}.{part}"]
    state["transformer.wte.weight"], state["lm_head.weight"] = own["table.weight"], own["leave.weight"]
    state["transformer.wpe.weight"][skipped:] = own["positions.weight"]
    theirs.load_state_dict(state)
    theirs.transformer.ln_f.eps = 1e-5
    return theirs


def small() -> LanguageModel:
    model = lively(LanguageModel(16, 3, 2, 2.5, length=9))
    nn.init.zeros_(model.leave.bias)
    return model


def test_the_language_model_is_gpt2():
    """The same weights, the same logits."""
    ours = small()
    agree(ours(IDS), gpt2(ours)(IDS).logits)


@pytest.mark.parametrize("hidden", [None, 6], ids=["table", "perceptron"])
@pytest.mark.parametrize("length", [1, 5])
def test_prefixes(hidden, length):
    """With the weights of their encoder: keys and values of every layer, and the logits of the whole model; folded, the table they keep."""
    ours = small()
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=length,
        prefix_projection=hidden is not None,
        encoder_hidden_size=hidden,
    )
    theirs = get_peft_model(gpt2(ours, skipped=length), config).eval()
    encoder = theirs.prompt_encoder["default"]
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.5)
    before = ours(IDS)
    add_prefix(ours, length=length, hidden=hidden)
    ours.prefix.table.load_state_dict(encoder.embedding.state_dict())
    if hidden is not None:
        ours.prefix.transform.load_state_dict(encoder.transform.state_dict())
    rows = encoder(torch.arange(length)[None])[0]
    agree(ours.prefix(), rows.unflatten(1, (3, 2, 16)).permute(1, 2, 0, 3))
    expected = theirs(IDS, attention_mask=torch.ones_like(IDS)).logits
    agree(ours(IDS), expected)
    assert (ours(IDS) - before).abs().max() > 0.1
    agree(fold(ours).prefix.table.weight, theirs.get_prompt_embedding_to_save("default"))
    agree(ours(IDS), expected)


@pytest.mark.parametrize("hidden", [None, 6], ids=["table", "perceptron"])
def test_parameters_of_a_prefix(hidden):
    """As many as theirs, under the same names within the encoder."""
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=hidden is not None, encoder_hidden_size=hidden
    )
    theirs = get_peft_model(gpt2(small()), config).prompt_encoder["default"].state_dict()
    ours = Prefix(4, layers=3, width=16, hidden=hidden).state_dict()
    assert {name.replace("table", "embedding"): value.shape for name, value in ours.items()} == {
        name: value.shape for name, value in theirs.items()
    }
