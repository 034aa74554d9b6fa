"""Built-in edits of how tokens and their places enter the model, and how logits leave it."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

from darwin_exp.individual import Genome
from darwin_exp.mutation.builtin import BuiltInEdit, Parameters
from darwin_exp.mutation.model_parts import ATTENTION, ATTENTION_READS, ModelEdit

if TYPE_CHECKING:
    from darwin_exp.mutation.code import Code


class Rotary(ModelEdit):
    """Source: Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding"."""

    name = "rotary"
    about = "positions"
    title = "rotary positions for learned ones"
    why = "Rotating queries and keys gives attention relative positions without learning them."
    hope = "much lower loss within a short budget"

    def draw(self, genome: Genome, rng: Random) -> dict[str, Any]:
        # Short contexts need no slow rotations, so smaller bases than the usual 10,000 may pay.
        return {"base": rng.choice([100, 1_000, 10_000])}

    def rewrite(self, code: Code, parameters: Parameters) -> None:
        attention = self.attention_class(code)
        if code.defines("rotate_by_position"):
            raise self.refuse("there already")
        self.drop_learned_positions(code, "rotary positions")
        self.wrap_queries_and_keys(code, "rotate_by_position")
        code.need("lru_cache", "torch")
        code.insert_before(
            attention,
            f'''
            @lru_cache(maxsize=4)
            def rotation(T: int, D: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
                """Return cosines and sines (T, D / 2) of every position's rotation angles."""
                # A table first made in inference mode could not be trained through later.
                with torch.inference_mode(False):
                    slowness = torch.linspace(0, 1, D // 2, device=device)
                    rates = {float(parameters["base"])} ** -slowness  # radians a position
                    angles = torch.outer(torch.arange(T, device=device), rates)  # (T, D / 2)
                    return angles.cos(), angles.sin()


            def rotate_by_position(x: torch.Tensor) -> torch.Tensor:
                """Rotate pairs of channels of x (B, H, T, D) by angles that grow with position."""
                cos, sin = rotation(x.size(-2), x.size(-1), x.device)
                a, b = x.float().chunk(2, dim=-1)  # two of (B, H, T, D / 2)
                return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)
            ''',
        )


class Alibi(ModelEdit):
    """Source: Press et al. 2021, "Train Short, Test Long: Attention with Linear Biases"."""

    name = "alibi"
    about = "positions"
    title = "ALiBi for learned positions"
    why = "Attention that fades with distance knows about nearness before it has learnt anything."
    hope = "lower loss within a short budget"

    def draw(self, genome: Genome, rng: Random) -> dict[str, Any]:
        # How slowly the slowest head fades, as a power of two; 8 is the published value.
        return {"slowest": rng.choice([4, 6, 8])}

    def rewrite(self, code: Code, parameters: Parameters) -> None:
        slowest = float(parameters["slowest"])
        attention = self.attention_class(code)
        if code.keyword_of(ATTENTION, "is_causal") != "True":
            raise self.refuse("attention's mask is another one already")
        self.drop_learned_positions(code, "ALiBi's bias for positions")
        code.before_calls(ATTENTION, ATTENTION_READS, lambda names: f"fading = alibi({names[0]})")
        code.set_keywords(ATTENTION, is_causal=None, attn_mask="fading")
        code.need("lru_cache", "torch")
        code.insert_before(
            attention,
            f'''
            @lru_cache(maxsize=4)
            def fading_by_distance(
                H: int, T: int, dtype: torch.dtype, device: torch.device
            ) -> torch.Tensor:
                """Return what is added to attention's scores (1, H, T, T), -inf for the future."""
                # A table first made in inference mode could not be trained through later.
                with torch.inference_mode(False):
                    heads = torch.arange(1, H + 1, device=device)
                    slopes = 2.0 ** (-{slowest} * heads / H)  # (H,)
                    place = torch.arange(T, device=device)
                    distance = place[:, None] - place  # (T, T), below 0 for the future
                    bias = -slopes[:, None, None] * distance  # (H, T, T)
                    return bias.masked_fill(distance < 0, float("-inf"))[None].to(dtype)


            def alibi(q: torch.Tensor) -> torch.Tensor:
                """Return the bias on the scores of queries q (B, H, T, D)."""
                return fading_by_distance(q.size(1), q.size(2), q.dtype, q.device)
            ''',
        )

    def describe(self, genome: Genome, parameters: Parameters) -> str:
        return f"{self.title}, slopes down to 2^-{parameters['slowest']}"


class EmbeddingNorm(ModelEdit):
    """Source: Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization"."""

    name = "embedding_norm"
    about = "embedding scale"
    title = "norm right after the embeddings"
    why = "Embeddings start small; at unit size the first blocks add to them instead of erasing."
    hope = "a steadier start"

    def rewrite(self, code: Code, parameters: Parameters) -> None:
        model = code.model_class()
        blocks, x = self.block_loop(code, model)
        if code.uses("layer_norm", (model, "forward")):
            raise self.refuse("the model normalises by itself already")
        code.before_loop(
            (model, "forward"), blocks, f"{x} = F.layer_norm({x}, ({x}.size(-1),))  # (B, T, C)"
        )
        code.need("F")


class BigramEmbedding(ModelEdit):
    """Source: Roy et al. 2022, "N-Grammer: Augmenting Transformers with latent n-grams"."""

    name = "bigram_embedding"
    about = "token context"
    title = "embedding of every pair of tokens"
    why = "What a token means depends most on the one before; a table says so without a product."
    hope = "much lower loss a step where the vocabulary is small"

    def draw(self, genome: Genome, rng: Random) -> dict[str, Any]:
        # Primes, so that pairs of a large vocabulary spread evenly over the rows.
        return {"most_rows": rng.choice([1_021, 4_093, 8_191, 16_381])}

    def rewrite(self, code: Code, parameters: Parameters) -> None:
        rows = int(parameters["most_rows"])
        model = code.model_class()
        forward = (model, "forward")
        tokens = code.parameter_of(forward)
        if code.uses("bigram_embedding"):
            raise self.refuse("there already")
        embedding = self.token_embedding(code, model)
        own = f"self.{embedding}"
        code.join(
            model,
            embedding,
            f"""
            # A row for every pair of tokens, or a shared one where there are too many pairs.
            pairs = min({own}.num_embeddings**2, {rows})
            self.bigram_embedding = nn.Embedding(pairs, {own}.embedding_dim)
            """,
        )
        code.wrap_layer_calls(forward, embedding, lambda x: f"{x} + pairs")
        code.before_layer_call(
            forward,
            embedding,
            f"""
            before = F.pad({tokens}[:, :-1], (1, 0))  # (B, T), token 0 before the first
            pairs = before * {own}.num_embeddings + {tokens}
            pairs = self.bigram_embedding(pairs % self.bigram_embedding.num_embeddings)
            """,
        )
        code.need("F", "nn")

    def describe(self, genome: Genome, parameters: Parameters) -> str:
        return f"{self.title}, at most {parameters['most_rows']} rows"


class LogitSoftCap(ModelEdit):
    """Source: Gemma Team 2024, "Gemma 2: Improving Open Language Models at a Practical Size"."""

    name = "logit_soft_cap"
    about = "logits"
    title = "soft cap on the logits"
    why = "Bounded logits keep rare tokens from causing outsized gradients early on."
    hope = "steadier training at high rates"

    def draw(self, genome: Genome, rng: Random) -> dict[str, Any]:
        return {"cap": rng.choice([10.0, 15.0, 20.0, 30.0])}

    def rewrite(self, code: Code, parameters: Parameters) -> None:
        cap = float(parameters["cap"])
        forward = (code.model_class(), "forward")
        if code.uses("tanh", forward):
            raise self.refuse("there already")
        if not code.wrap_returns(forward, lambda x: f"{cap} * torch.tanh({x} / {cap})"):
            raise self.refuse("the model returns no plain logits")
        code.need("torch")

    def describe(self, genome: Genome, parameters: Parameters) -> str:
        return f"{self.title} at {parameters['cap']:g}"


class LogitBias(ModelEdit):
    """Source: Press and Wolf 2017, "Using the Output Embedding to Improve Language Models"."""

    name = "logit_bias"
    about = "logit bias"
    title = "a bias for every token's logit"
    why = "How frequent each token is can be learnt at once and need not burden the matrices."
    hope = "a faster start"

    def rewrite(self, code: Code, parameters: Parameters) -> None:
        model = code.model_class()
        if code.uses("logit_bias"):
            raise self.refuse("there already")
        embedding = self.token_embedding(code, model)
        code.join(
            model,
            embedding,
            f"self.logit_bias = nn.Parameter(torch.zeros(self.{embedding}.num_embeddings))",
        )
        if not code.wrap_returns((model, "forward"), lambda x: f"{x} + self.logit_bias"):
            raise self.refuse("the model returns no plain logits")
        code.need("nn", "torch")


EMBEDDING_EDITS: tuple[BuiltInEdit, ...] = (
    Rotary(),
    Alibi(),
    EmbeddingNorm(),
    BigramEmbedding(),
    LogitSoftCap(),
    LogitBias(),
)
