"""Good answers that rewrite model.py only.

Each keeps the model causal, lets it serve any length up to the context, and leaves `build_model`
able to rebuild it from the same model.json.

Sizes in the comments are model.py's: B sequences, T tokens, C channels, H heads of D channels.
"""

from __future__ import annotations

import ast
import json

from darwin_exp.stub_llm.answers import Answer, Kind, changes
from darwin_exp.stub_llm.model_source import (
    ATTENTION,
    at_end_of_init,
    before_attention,
    before_blocks,
    normalised_queries_and_keys,
    queries_and_keys,
    with_logits,
)
from darwin_exp.stub_llm.source import (
    Code,
    DoesNotFit,
    absent,
    calls,
    class_calling,
    function,
    insert_before,
    model_class,
    once,
    once_like,
    parse,
    segment,
    settings_in,
    sole,
    spliced,
)


@changes(
    "squared_relu",
    Kind.GOOD,
    "squared ReLU for GELU",
    "relu(x)^2 is sparser than GELU and cheaper without a fused kernel; Primer found it to "
    "learn faster at small scale.",
    "lower loss a step, slightly faster steps",
)
def squared_relu(code: Code) -> dict[str, str]:
    text = code.model
    gelu = sole(calls(parse(text), "gelu"), "calls of gelu")
    if len(gelu.args) != 1 or gelu.keywords or not isinstance(gelu.func, ast.Attribute):
        raise DoesNotFit("gelu is called in another way")
    module, x = segment(text, gelu.func.value), segment(text, gelu.args[0])
    return {"model.py": spliced(text, (gelu, f"{module}.relu({x}).square()"))}


@changes(
    "swiglu",
    Kind.GOOD,
    "SwiGLU in the MLP",
    "A gated hidden layer of two thirds the width has about as many weights and learns more "
    "with each of them (Shazeer 2020).",
    "lower loss a step at the same size",
)
def swiglu(code: Code) -> dict[str, str]:
    text = once_like(
        code.model,
        r"^( +)x = F\.gelu\(self\.expand\(x\)\)[^\n]*$",
        r"\1gate, x = self.expand(x).chunk(2, dim=-1)  # two of (B, T, hidden)" + "\n"
        r"\1x = F.silu(gate) * x",
    )
    hidden = "8 * (config.width // 3)"
    text = once(
        text,
        "self.expand = nn.Linear(config.width, 4 * config.width",
        f"self.expand = nn.Linear(config.width, 2 * {hidden}",
    )
    text = once(
        text, "nn.Linear(4 * config.width, config.width", f"nn.Linear({hidden}, config.width"
    )
    return {"model.py": text}


@changes(
    "rms_norm",
    Kind.GOOD,
    "RMSNorm for LayerNorm",
    "Subtracting the mean buys nothing at this size; without it every norm is a little cheaper.",
    "the same loss a step, slightly faster steps",
)
def rms_norm(code: Code) -> dict[str, str]:
    text = once_like(
        code.model,
        r"^( +)return F\.layer_norm\(x, self\.weight\.shape, self\.weight, self\.bias, ([^\s,)]+)\)"
        r"[^\n]*$",
        r"\1scaled = F.rms_norm(x, self.weight.shape, self.weight, \2)  # (B, T, C)" + "\n"
        r"\1return scaled if self.bias is None else scaled + self.bias",
    )
    return {"model.py": text}


@changes(
    "zero_projections",
    Kind.GOOD,
    "residual projections start at zero",
    "Branches that start silent leave the residual stream clean, so the first steps train "
    "embeddings and head undisturbed.",
    "a faster start",
)
def zero_projections(code: Code) -> dict[str, str]:
    text = once(
        code.model,
        "nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layers))",
        "nn.init.zeros_(parameter)  # every branch starts silent",
    )
    return {"model.py": text}


@changes(
    "fan_in_scale",
    Kind.GOOD,
    "initial weights scaled by their inputs",
    "0.02 is right for a width of about a thousand; this model is far narrower, and its "
    "activations start too small.",
    "a faster start",
)
def fan_in_scale(code: Code) -> dict[str, str]:
    text = code.model
    if "math." not in text:
        raise DoesNotFit("math is not imported")
    gain = code.rng.choice((0.4, 0.5, 0.7))
    new = f"nn.init.normal_(parameter, std={gain} / math.sqrt(parameter.size(-1)))"
    return {"model.py": once(text, "nn.init.normal_(parameter, std=0.02)", new)}


@changes(
    "qk_norm",
    Kind.GOOD,
    "normalised queries and keys",
    "Attention scores grow with the weights until the softmax saturates. With queries and keys "
    "of unit size they cannot.",
    "steadier training, room for a higher rate",
)
def qk_norm(code: Code) -> dict[str, str]:
    return {"model.py": normalised_queries_and_keys(code.model)}


@changes(
    "logit_soft_cap",
    Kind.GOOD,
    "soft cap on the logits",
    "Early on the tied head overshoots on frequent tokens; a smooth bound keeps those gradients "
    "in hand (Gemma 2).",
    "steadier training at high rates",
)
def logit_soft_cap(code: Code) -> dict[str, str]:
    text = code.model
    absent(text, "torch.tanh(")
    if "import torch\n" not in text:
        raise DoesNotFit("torch is not imported")
    cap = code.rng.choice((10.0, 15.0, 20.0))
    return {"model.py": with_logits(text, f"{cap} * torch.tanh({{x}} / {cap})")}


@changes(
    "logit_bias",
    Kind.GOOD,
    "a learnt bias for every token's logit",
    "How frequent a token is can be learnt within a few steps by a bias, and need not go "
    "through the embedding matrix.",
    "a faster start",
)
def logit_bias(code: Code) -> dict[str, str]:
    text = code.model
    absent(text, "logit_bias")
    text = with_logits(text, "{x} + self.logit_bias")
    added = "self.logit_bias = nn.Parameter(torch.zeros(config.vocab_size))"
    return {"model.py": at_end_of_init(text, added)}


@changes(
    "embedding_norm",
    Kind.GOOD,
    "norm right after the embeddings",
    "Embeddings start at 0.02 while blocks write at full size; at unit size the tokens stay "
    "visible in the stream.",
    "a steadier start",
)
def embedding_norm(code: Code) -> dict[str, str]:
    text = code.model
    absent(text, ".size(-1),))  # (B, T, C), at unit size")
    added = "{x} = F.layer_norm({x}, ({x}.size(-1),))  # (B, T, C), at unit size"
    return {"model.py": before_blocks(text, added)}


@changes(
    "rotary_positions",
    Kind.GOOD,
    "rotary positions for learned ones",
    "Learned positions have to be trained row by row. Rotations give attention relative "
    "positions from the first step (Su et al. 2021).",
    "much lower loss within a short budget",
)
def rotary_positions(code: Code) -> dict[str, str]:
    text = code.model
    absent(text, "def rotated(", "rotate_by_position")
    if "settings.json" in code.files:
        settings = settings_in(code.files)
        if int(settings.get("width", 1)) % (2 * int(settings.get("n_heads", 1))):
            raise DoesNotFit("a head's channels cannot be paired")
    query, key = queries_and_keys(text)
    for pattern in (
        r"^ +self\.position_embedding = [^\n]*\n",
        r"^ +positions = torch\.arange\([^\n]*\n",
        r" \+ self\.position_embedding\(positions\)",
    ):
        text = once_like(text, pattern, "")
    text = before_attention(text, f"{query}, {key} = rotated({query}), rotated({key})")
    base = code.rng.choice((100.0, 1_000.0, 10_000.0))
    attention = class_calling(parse(text), ATTENTION)
    return {"model.py": insert_before(text, attention, _ROTATED.format(base=base))}


_ROTATED = '''
def rotated(x: Tensor) -> Tensor:
    """Rotate pairs of channels of x (B, H, T, D) by angles that grow with the position."""
    T, D = x.shape[-2:]
    rates = {base} ** -torch.linspace(0, 1, D // 2, device=x.device)  # radians a position
    angles = torch.arange(T, device=x.device)[:, None] * rates  # (T, D / 2)
    cos, sin = angles.cos(), angles.sin()
    a, b = x.float().chunk(2, dim=-1)  # two of (B, H, T, D / 2)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


'''


@changes(
    "token_shift",
    Kind.GOOD,
    "attention sees half its channels from the token before",
    "Most of what a character model needs is right beside it. Shifting half the channels by one "
    "place shows neighbours to each other without spending a head on it.",
    "lower loss a step at hardly any cost",
)
def token_shift(code: Code) -> dict[str, str]:
    text = code.model
    absent(text, "x[:, :-1, : C // 2]")
    shifted = "F.pad(x[:, :-1, : C // 2], (0, 0, 1, 0))  # (B, T, C / 2)"
    text = once_like(
        text,
        r"^( +)B, T, C = x\.shape$",
        rf"\1B, T, C = x.shape\n\1before = {shifted}\n"
        r"\1x = torch.cat((before, x[:, :, C // 2 :]), dim=-1)",
    )
    return {"model.py": text}


@changes(
    "branch_gains",
    Kind.GOOD,
    "a learnt gain for each channel of each branch",
    "Blocks differ in how much they have to say; a gain lets each learn how loudly it speaks.",
    "slightly lower loss",
)
def branch_gains(code: Code) -> dict[str, str]:
    text = code.model
    for branch in ("attention", "mlp"):
        text = once(
            text,
            f"x + self.{branch}(self.{branch}_norm(x))",
            f"x + self.{branch}_gain * self.{branch}(self.{branch}_norm(x))",
        )
    gain = "nn.Parameter(torch.ones(config.width))"
    text = once_like(
        text,
        r"^( +)self\.mlp = MLP\(config\)$",
        rf"\1self.mlp = MLP(config)\n\1self.attention_gain = {gain}\n\1self.mlp_gain = {gain}",
    )
    return {"model.py": text}


@changes(
    "parallel_block",
    Kind.GOOD,
    "attention and MLP side by side",
    "Both branches can read one normalised copy of the stream, which saves a norm in every "
    "block (GPT-J, PaLM).",
    "slightly faster steps at about the same loss",
)
def parallel_block(code: Code) -> dict[str, str]:
    text = once_like(
        code.model,
        r"^( +)x = x \+ self\.attention\(self\.attention_norm\(x\)\)[^\n]*\n"
        r" +updated: Tensor = x \+ self\.mlp\(self\.mlp_norm\(x\)\)[^\n]*$",
        r"\1normal = self.attention_norm(x)  # (B, T, C)" + "\n"
        r"\1updated: Tensor = x + self.attention(normal) + self.mlp(normal)  # (B, T, C)",
    )
    return {"model.py": once_like(text, r"^ +self\.mlp_norm = [^\n]*\n", "")}


@changes(
    "pair_embedding",
    Kind.GOOD,
    "an embedding for every pair of neighbouring tokens",
    "What a token means depends most on the one before it. A hashed table of pairs says so "
    "without a single matrix product.",
    "much lower loss a step where the vocabulary is small",
    requests=[
        {
            "type": "dataset",
            "reason": "The table of pairs would gain from more text, of whatever sort.",
            "content": json.dumps(
                {"source": "stdlib", "path": "stdlib", "licence": "PSF-2.0", "most_mb": 64}
            ),
        }
    ],
)
def pair_embedding(code: Code) -> dict[str, str]:
    text = code.model
    absent(text, "pair_embedding", "bigram_embedding")
    once(text, "self.config = config", "self.config = config")  # forward asks it below
    forward = function(model_class(parse(text)), "forward")
    tokens = forward.args.args[-1].arg
    text = before_blocks(
        text,
        f"""
        # A row for every pair, shared where there are more pairs than rows.
        before = F.pad({tokens}[:, :-1], (1, 0))  # (B, T), token 0 before the first
        pairs = before * self.config.vocab_size + {tokens}
        {{x}} = {{x}} + self.pair_embedding(pairs % self.pair_embedding.num_embeddings)
        """,
    )
    rows = code.rng.choice((1_021, 2_039, 4_093))
    text = at_end_of_init(
        text,
        f"""
        self.pair_embedding = nn.Embedding({rows}, config.width)
        nn.init.normal_(self.pair_embedding.weight, std=0.02)
        """,
    )
    return {"model.py": text}


MODEL_ANSWERS: tuple[Answer, ...] = (
    squared_relu,
    swiglu,
    rms_norm,
    zero_projections,
    fan_in_scale,
    qk_norm,
    logit_soft_cap,
    logit_bias,
    embedding_norm,
    rotary_positions,
    token_shift,
    branch_gains,
    parallel_block,
    pair_embedding,
)
