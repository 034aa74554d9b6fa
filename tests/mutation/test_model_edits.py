"""What each edit of the model does to it, beyond the laws that all edits keep."""

from __future__ import annotations

import sys
import types
from itertools import permutations
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from darwin_exp.evaluation.logits_server import matrix_watch
from darwin_exp.individual import Genome
from darwin_exp.mutation import EDITS
from darwin_exp.mutation.builtin import read_settings
from darwin_exp.protocols import EditFailed
from tests.mutation.edited import base_genome, with_settings

V, T = 31, 16
BASE = base_genome()


def applied(name: str, genome: Genome = BASE, **parameters: Any) -> Genome:
    return EDITS[name].apply(genome, parameters)


def built(genome: Genome, seed: int = 0) -> nn.Module:
    """Build a genome's model, freshly initialised and in evaluation mode."""
    module = types.ModuleType("model_under_test")
    # Where dataclasses look up annotations.
    sys.modules["model_under_test"] = module
    exec(compile(genome.as_dict["model.py"], "model.py", "exec"), module.__dict__)
    fields = module.GPTConfig.__dataclass_fields__
    arguments = {**read_settings(genome), "vocab_size": V, "context_length": T}
    torch.manual_seed(seed)
    model = module.build_model({k: v for k, v in arguments.items() if k in fields})
    assert isinstance(model, nn.Module)
    return model.eval()


def tokens(rows: int = 3, seed: int = 1) -> Tensor:
    return torch.randint(V, (rows, T), generator=torch.Generator().manual_seed(seed))


def weights(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def products(model: nn.Module) -> dict[str, float]:
    """Return how many rows every weight is multiplied with in one pass."""
    named = dict(model.named_parameters())
    with matrix_watch()(named, x := tokens()) as seen:
        model(x)
    return {name: rows / x.numel() for name, rows in seen.rows.items()}


def test_a_gate_leaves_the_number_of_weights_about_equal() -> None:
    wide = with_settings(BASE, width=128, n_heads=4)
    ratio = weights(built(applied("swiglu", wide))) / weights(built(wide))
    assert 0.97 < ratio < 1.03


@pytest.mark.parametrize("order", [("swiglu", "squared_relu"), ("squared_relu", "swiglu")])
def test_a_gated_squared_relu_comes_out_the_same_in_either_order(order: tuple[str, str]) -> None:
    x = tokens()
    model = built(applied(order[1], applied(order[0])))
    torch.testing.assert_close(
        model(x), built(applied("squared_relu", applied("swiglu")))(x), atol=0, rtol=0
    )
    part: Any
    for part in model.modules():
        if hasattr(part, "gate"):
            h = torch.randn(2, T, 32)
            expected = part.projection(torch.relu(part.expand(h)).square() * (1 + part.gate(h)))
            torch.testing.assert_close(part(h), expected)


@pytest.mark.parametrize(("group", "heads", "shared"), [(2, 4, 2), (4, 4, 4), (4, 2, 2)])
def test_query_heads_of_a_group_read_the_same_keys(group: int, heads: int, shared: int) -> None:
    genome = applied("grouped_kv", with_settings(BASE, width=32, n_heads=heads), group=group)
    seen: list[tuple[Tensor, Tensor]] = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.append((k, v))
        return attention(q, k, v, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        built(genome)(tokens())
    for tensor in seen[0]:
        heads_apart = {tensor[:, head].detach().numpy().tobytes() for head in range(heads)}
        assert len(heads_apart) == heads // shared


def test_fewer_key_heads_still_fit_when_the_number_of_heads_changes() -> None:
    genome = applied("grouped_kv", with_settings(BASE, width=32, n_heads=4), group=4)
    changed = with_settings(genome, width=48, n_layers=2, n_heads=3)
    assert built(changed)(tokens()).shape == (3, T, V)


def test_alibi_is_blind_to_absolute_positions() -> None:
    model = built(applied("alibi", slowest=8))
    pattern = tokens(rows=1)[:, :2].repeat(1, T // 2)
    # Whatever it attends to is one of the same two tokens, so only nearness is left to differ.
    constant = model(pattern[:, :1].expand(1, T))
    torch.testing.assert_close(constant, constant[:, :1].expand_as(constant))
    assert not torch.allclose(model(pattern)[:, 2], model(pattern)[:, -2], atol=1e-7)


def test_attention_is_biased_by_distance_and_never_sees_the_future() -> None:
    seen: list[Tensor] = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Any, attn_mask: Tensor, **options: Any) -> Any:
        seen.append(attn_mask)
        options["attn_mask"] = attn_mask
        return attention(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        built(applied("alibi", slowest=8))(tokens())
    mask = seen[0][0]  # (H, T, T)
    assert torch.isneginf(
        mask[:, torch.triu_indices(T, T, 1)[0], torch.triu_indices(T, T, 1)[1]]
    ).all()
    torch.testing.assert_close(mask[:, 5, 5], torch.zeros(2))
    torch.testing.assert_close(mask[:, 5, 2], torch.tensor([-3 / 2**4, -3 / 2**8]))


def test_values_are_those_of_the_first_block_in_part() -> None:
    genome = with_settings(BASE, n_layers=3)
    seen: list[Tensor] = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.append(v)
        return attention(q, k, v, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        model = built(applied("value_residual", genome, share=0.3))
        model(tokens())
        plain = built(genome)
        plain(tokens())
    first, second = seen[0], seen[1]
    # Up to the second block's attention both models compute the same.
    torch.testing.assert_close(first, seen[3])
    torch.testing.assert_close(second, 0.7 * seen[4] + 0.3 * first)
    assert not model.first_values  # nothing of a pass stays behind


def test_shared_blocks_keep_the_depth_and_store_nothing_twice() -> None:
    for layers, stored in ((2, 1), (3, 2), (4, 2)):
        model = built(applied("shared_blocks", with_settings(BASE, n_layers=layers)))
        names = {name for name in model.state_dict() if name.endswith("expand.weight")}
        assert len(names) == stored
        used = sum(rows for name, rows in products(model).items() if name in names)
        assert used == layers


def test_a_short_convolution_starts_as_no_change() -> None:
    x = tokens()
    model = built(applied("short_convolution"))
    torch.testing.assert_close(model(x), built(BASE)(x), atol=0, rtol=0)
    part: Any
    for part in model.modules():
        if hasattr(part, "one_before"):
            nn.init.ones_(part.one_before)
            nn.init.constant_(part.two_before, 2.0)
            h = torch.randn(1, 4, part.one_before.numel())
            torch.testing.assert_close(part(h)[:, 3], h[:, 3] + h[:, 2] + 2 * h[:, 1])
            torch.testing.assert_close(part(h)[:, 0], h[:, 0])


def test_half_the_channels_come_from_the_token_before() -> None:
    genome = applied("token_shift", where="both")
    namespace: dict[str, Any] = {"__name__": "model_under_test"}
    built(genome)
    exec(compile(genome.as_dict["model.py"], "model.py", "exec"), namespace)
    h = torch.randn(2, 5, 8)
    shifted = namespace["shift_half"](h)
    torch.testing.assert_close(shifted[:, 1:, :4], h[:, :-1, :4], atol=0, rtol=0)
    torch.testing.assert_close(shifted[:, :, 4:], h[:, :, 4:], atol=0, rtol=0)
    assert not shifted[:, 0, :4].any()


@pytest.mark.parametrize(("where", "parts"), [("attention", 1), ("MLP", 1), ("both", 2)])
def test_a_token_shift_goes_where_it_was_drawn_for(where: str, parts: int) -> None:
    assert (
        applied("token_shift", where=where).as_dict["model.py"].count("x = shift_half(x)") == parts
    )


@pytest.mark.parametrize(("most", "rows"), [(8_191, V * V), (97, 97)])
def test_every_pair_of_tokens_has_a_row_as_far_as_there_are_rows(most: int, rows: int) -> None:
    model = built(applied("bigram_embedding", most_rows=most))
    table = model.get_submodule("bigram_embedding")
    assert isinstance(table, nn.Embedding)
    assert table.num_embeddings == rows
    looked_up: list[Tensor] = []
    table.register_forward_hook(lambda _, inputs, __: looked_up.append(inputs[0]))
    pairs = torch.cartesian_prod(torch.arange(V), torch.arange(V))  # (V * V, 2)
    model(pairs)
    assert len(set(looked_up[0][:, 1].tolist())) == rows


def test_parallel_branches_read_the_same_copy() -> None:
    model = built(applied("parallel_block"))
    block: Any = next(part for part in model.modules() if hasattr(part, "attention_norm"))
    x = torch.randn(2, T, 32)
    y = block.attention_norm(x)
    torch.testing.assert_close(block(x), x + block.attention(y) + block.mlp(y))
    assert not any(name.endswith("mlp_norm.weight") for name, _ in model.named_parameters())


@pytest.mark.parametrize("ratio", [2, 3, 6, 8])
def test_the_hidden_layer_takes_the_width_that_was_drawn(ratio: int) -> None:
    genome = applied("hidden_ratio", ratio=ratio)
    shape = built(genome).state_dict()["blocks.0.mlp.expand.weight"].shape
    assert shape == (ratio * 32, 32)
    assert f"{ratio} times as wide" in genome.as_dict["model.py"]
    with pytest.raises(EditFailed, match="already"):
        applied("hidden_ratio", genome, ratio=ratio)


def test_another_hidden_width_also_fits_a_gated_layer() -> None:
    gated = applied("swiglu", with_settings(BASE, width=96))
    narrow, wide = (built(applied("hidden_ratio", gated, ratio=r)) for r in (2, 8))
    assert weights(narrow) < weights(built(gated)) < weights(wide)


@pytest.mark.parametrize("name", ["sandwich_norm", "layer_scale"])
def test_a_branch_is_as_large_as_its_gain_says(name: str) -> None:
    x = torch.randn(2, T, 32)
    sizes = []
    for gain in (0.1, 1.0):
        model = built(applied(name, gain=gain))
        block: Any = next(part for part in model.modules() if hasattr(part, "attention_norm"))
        sizes.append(block.mlp(x).norm())
    torch.testing.assert_close(10 * sizes[0], sizes[1])


@pytest.mark.parametrize("order", [*permutations(("sandwich_norm", "layer_scale"))])
def test_a_gain_is_never_normalised_away(order: tuple[str, str]) -> None:
    gains = {"sandwich_norm": 0.05, "layer_scale": 0.3}
    genome = BASE
    for name in order:
        genome = applied(name, genome, gain=gains[name])
    block: Any = built(genome).get_submodule("blocks.0")
    for branch in (block.attention, block.mlp):
        # Only inputs of some size leave the norm's own epsilon without a say.
        size = branch(torch.randn(2, T, 32) * 1e3).square().mean().sqrt()
        torch.testing.assert_close(size, torch.tensor(0.05 * 0.3), atol=0, rtol=1e-2)


def test_blocks_start_from_embeddings_of_unit_size() -> None:
    model = built(applied("embedding_norm"))
    read: list[Tensor] = []
    model.get_submodule("blocks.0").register_forward_pre_hook(
        lambda _, inputs: read.append(*inputs)
    )
    model(tokens())
    torch.testing.assert_close(read[0].var(-1, unbiased=False), torch.ones(3, T), atol=0.1, rtol=0)


def test_initial_weights_are_scaled_but_not_gains() -> None:
    before = built(BASE).state_dict()
    after = built(applied("init_scale", factor=2.0)).state_dict()
    for name, tensor in before.items():
        factor = 2.0 if tensor.dim() == 2 else 1.0
        torch.testing.assert_close(after[name], factor * tensor)


def test_a_matrix_of_two_layers_is_scaled_once() -> None:
    text = BASE.as_dict["model.py"]
    tie = (
        "        self.initialise_weights()\n"
        "        self.twin = nn.Linear(config.width, config.vocab_size, bias=False)\n"
        "        self.twin.weight = self.token_embedding.weight\n"
    )
    twins = BASE.with_files({"model.py": text.replace("        self.initialise_weights()\n", tie)})
    scaled = built(applied("init_scale", twins, factor=3.0)).state_dict()
    before = built(twins).state_dict()
    for name in ("token_embedding.weight", "twin.weight"):
        torch.testing.assert_close(scaled[name], 3.0 * before[name])


def test_every_logit_has_a_bias_that_starts_at_nothing() -> None:
    x = tokens()
    model = built(applied("logit_bias"))
    torch.testing.assert_close(model(x), built(BASE)(x), atol=0, rtol=0)
    nn.init.constant_(model.get_parameter("logit_bias"), 3.0)
    torch.testing.assert_close(model(x), built(BASE)(x) + 3.0)


@pytest.mark.parametrize("seed", range(8))
def test_another_number_of_heads_always_divides_the_width(seed: int) -> None:
    genome = with_settings(BASE, width=96, n_heads=6)
    edit = EDITS["head_count"]
    drawn = edit.draw(genome, Random(seed))
    after = read_settings(edit.apply(genome, drawn))
    assert after["n_heads"] != 6
    assert after["width"] % (2 * after["n_heads"]) == 0
    with pytest.raises(EditFailed, match="does not divide"):
        applied("head_count", genome, value=7)


def test_a_width_that_leaves_no_room_for_other_heads_is_said_so() -> None:
    with pytest.raises(EditFailed, match="leaves no room"):
        EDITS["head_count"].draw(with_settings(BASE, width=10, n_heads=1), Random(0))


# Models in which something stands in another way than an edit can follow.
REFUSALS = {
    "rotary": (
        "        for name, parameter in self",
        "        print(self.position_embedding.weight.shape)\n        for name, parameter in self",
        "still needs self.position_embedding",
    ),
    "alibi": ("is_causal=True", "is_causal=T > 1", "mask is another one"),
    "parallel_block": ("x = x + self.attention(", "x = 1.0 * x + self.attention(", "no block adds"),
    "shared_blocks": ("range(config.n_layers)", "range(0, config.n_layers)", "made in another way"),
    "grouped_kv": (".split(C, dim=2)", ".tensor_split(3, dim=2)", "cut apart in another way"),
    "hidden_ratio": ("4 * config.width", "config.hidden", "no multiple"),
    "swiglu": ("self.expand(x)", "self.expand(x + self.expand(x))", "called in another way"),
    "embedding_norm": ("for block in self.blocks", "for block in []", "does not loop"),
    "bigram_embedding": ("token_embedding(tokens)", "token_embedding(tokens + 0)", "no embedding"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_an_edit_says_why_it_does_not_fit(name: str) -> None:
    old, new, reason = REFUSALS[name]
    text = BASE.as_dict["model.py"]
    assert old in text
    genome = BASE.with_files({"model.py": text.replace(old, new)})
    with pytest.raises(EditFailed, match=reason):
        EDITS[name].apply(genome, EDITS[name].draw(genome, Random(0)))


def test_a_name_imported_in_a_function_is_imported_for_all() -> None:
    text = BASE.as_dict["model.py"].replace("import math\n", "", 1)
    loop = "        for name, parameter in self.named_parameters():\n"
    genome = BASE.with_files({"model.py": text.replace(loop, f"        import math\n\n{loop}")})
    assert built(applied("grouped_kv", genome, group=2))(tokens()).shape == (3, T, V)


def test_what_would_change_nothing_is_refused() -> None:
    with pytest.raises(EditFailed, match="cannot be divided"):
        applied("grouped_kv", with_settings(BASE, n_heads=3, width=24), group=4)
    with pytest.raises(EditFailed, match="no neighbour"):
        applied("shared_blocks", with_settings(BASE, n_layers=1))


def test_a_description_names_the_group_that_the_heads_allow() -> None:
    told = EDITS["grouped_kv"].describe(with_settings(BASE, n_heads=6, width=96), {"group": 4})
    assert told.endswith("one for 2 query heads")
    bare = Genome.of({"model.py": BASE.as_dict["model.py"]})
    assert EDITS["grouped_kv"].describe(bare, {"group": 4}).endswith("one for 4 query heads")
    assert "head_group" in applied("grouped_kv", bare, group=4).as_dict["model.py"]
