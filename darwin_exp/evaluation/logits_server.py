"""Serves the logits of a trained model, inside the sandbox, beside the model's own code.

Reads: code/model.py, in/model.safetensors and in/model.json; framed requests.
Writes: framed answers, and nothing else.
Never: sees a target, computes a score, or imports anything but the standard library, torch and
safetensors, so that this one file can be mounted into any sandbox and loaded by its path.

Model code runs in this very process and could answer in its place. That is why no answer is
believed: the scorer owns targets, normalisation and clock, and compares two fresh servers.

A request is `REQUEST` (what, B, T, steps, bfloat16, compiled), followed by B x T int32 tokens. An
answer is `ANSWER` (status and three sizes), followed by what the request asks for:

    LOAD    (0, 0, 0) once the model is rebuilt and its weights are in it; B and T are 0
    LOGITS  (B, T, V), then so many float32: the logits of every position
    USES    (length, 0, 0), then so much JSON: what `_Server.uses` returns
    RATE    (B, T, 0) once `steps` forward and backward passes are done, each over its own share of
            the rows, then so many float32: the loss of every token
    FORWARD the same without the backward passes
    any     FAILED and (length, 0, 0), then so much text: the end of a traceback while no token was
            sent yet, and after that one of `MISBEHAVIOURS`, or an error's type and place

All numbers are little-endian.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import shutil
import struct
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import partial

# Bound here and not looked up later: model code may replace what a module holds.
from json import dumps, loads
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from torch import Tensor, nn

REQUEST = struct.Struct("<6I")
ANSWER = struct.Struct("<B3I")
LOGITS, USES, RATE, LOAD, FORWARD = 1, 2, 3, 4, 5
DONE, FAILED = 0, 1
MAX_ERROR_CHARACTERS = 4_000

NO_TENSOR = "model(tokens) returned something that is no tensor"
CHANGED_WEIGHTS = "the model changed its own weights while it was scored"
NO_COMPILER = "there is no C++ compiler to compile with"
MISBEHAVIOURS = (NO_TENSOR, CHANGED_WEIGHTS, NO_COMPILER)


class Misbehaviour(Exception):
    """A model cannot be scored or timed like this; the text is one of `MISBEHAVIOURS`."""


def serve(job: Mapping[str, Any], folder: Path, reader: BinaryIO, writer: BinaryIO) -> None:
    """Answer requests until the other side closes its end.

    Args:
        job: the content of job.json: device, context_length and vocab_size.
        folder: the working directory that holds code/ and in/.
        reader: where requests come from.
        writer: where answers go.
    """
    server = _Server(job["device"], folder)
    answers: dict[int, Callable[..., _Answer]] = {
        LOGITS: server.logits,
        USES: server.uses,
        RATE: server.rate,
        FORWARD: partial(server.rate, backward=False),
        LOAD: server.load,
    }
    while header := _read(reader, REQUEST.size):
        what, B, T, steps, bfloat16, compiled = REQUEST.unpack(header)
        raw = _read(reader, 4 * B * T)
        try:
            sizes, content = answers[what](raw, (B, T), steps, bool(bfloat16), bool(compiled))
            status = DONE
        # A model may raise anything, SystemExit included, and must be told apart from a dead one.
        except BaseException as error:
            whole = what == LOAD
            status, text = FAILED, traceback.format_exc() if whole else server.in_one_line(error)
            text = text[-MAX_ERROR_CHARACTERS:]
            content = memoryview(text.encode("utf-8", "replace"))
            sizes = (len(content), 0, 0)
        _write(writer, ANSWER.pack(status, *sizes))
        _write(writer, content)
        writer.flush()


_Answer = tuple[tuple[int, int, int], memoryview]
_NOTHING = memoryview(b"")


class _Server:
    """The saved model, loaded when first asked for, so that every failure has a frame to go in."""

    def __init__(self, device: str, folder: Path) -> None:
        # Everything used below is bound before a line of model code runs: a model that patches
        # torch afterwards changes its own numbers, not what is asked of it.
        import torch
        from safetensors.torch import load_file
        from torch.nn.functional import cross_entropy

        self._torch = torch
        self._cross_entropy = cross_entropy
        self._load_file = load_file
        self._watch = matrix_watch()
        self._device = device
        self._folder = folder
        self._scored: nn.Module | None = None
        self._trained: nn.Module | None = None
        self._compiled: Callable[[Tensor], Tensor] | None = None

    def load(self, *_: object) -> _Answer:
        """Rebuild the model before it is asked anything, so that a failure can be told in full."""
        self._scored = self._load(trainable=False)
        return (0, 0, 0), _NOTHING

    def in_one_line(self, error: BaseException) -> str:
        """Return an error's type and where in the genome it arose.

        Its own text may quote the tokens that the model was sent, which are held out.
        """
        if isinstance(error, Misbehaviour):
            return str(error)
        place, trace = "", error.__traceback__
        code = str(self._folder / "code")
        while trace is not None:
            path = trace.tb_frame.f_code.co_filename
            if path.startswith(code):
                place = f" at {path[len(code) + 1 :]}:{trace.tb_lineno}"
            trace = trace.tb_next
        return type(error).__name__ + place

    def logits(self, raw: bytes, shape: tuple[int, int], *_: object) -> _Answer:
        """Return the logits of every position, as float32."""
        torch = self._torch
        if self._scored is None:
            self._scored = self._load(trainable=False)
        # Not inference mode: what a model caches in it (rotary tables, say) could not take part
        # in the backward pass of a later request.
        with torch.no_grad():
            logits = self._forward(self._scored, self._tokens(raw, shape))
            if logits.dim() != 3:
                return (*logits.shape, 0, 0, 0)[:3], _NOTHING
            logits = logits.to("cpu", torch.float32).contiguous()
        B, T, V = logits.shape
        return (B, T, V), _memory_of(logits)

    def uses(self, raw: bytes, shape: tuple[int, int], *_: object) -> _Answer:
        """Return which weights one forward pass multiplies with, and what else it multiplies.

        The answer's `rows` gives, by the checkpoint's own names, with how many rows each weight
        was multiplied; a weight from which the logits have no gradient is left out. Its
        `activation_flops` counts the products of two activations, such as attention's.
        """
        torch = self._torch
        model = self._trainable()
        tensors = model.state_dict(keep_vars=True)
        weights = {name: tensors[name] for name in self._names if tensors[name].requires_grad}
        tokens = self._tokens(raw, shape)
        with self._watch(weights, tokens) as seen:
            logits = self._forward(model, tokens)
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(logits.shape, generator=generator).to(logits.device)
        (logits.float() * direction).sum().backward()
        rows = {
            name: count
            for name, count in seen.rows.items()
            if (grad := weights[name].grad) is not None and bool(grad.count_nonzero())
        }
        model.zero_grad(set_to_none=True)
        content = dumps({"rows": rows, "activation_flops": seen.activation_flops})
        return (len(content), 0, 0), memoryview(content.encode("ascii"))

    def rate(
        self,
        raw: bytes,
        shape: tuple[int, int],
        steps: int,
        bfloat16: bool,
        compiled: bool,
        backward: bool = True,
    ) -> _Answer:
        """Run passes of the saved model over fresh rows each; whoever asked holds the clock."""
        torch = self._torch
        model = self._trainable()
        forward: Callable[[Tensor], Tensor] = self._compile(model) if compiled else model
        n_rows, T = shape
        passes = torch.frombuffer(bytearray(raw), dtype=torch.int32).view(steps, -1, T)
        losses = []
        for rows in passes:
            tokens = rows.to(self._device, torch.int64)
            targets = tokens.roll(-1, dims=1).flatten()
            with (
                torch.set_grad_enabled(backward),
                torch.autocast(self._device, torch.bfloat16, enabled=bfloat16),
            ):
                logits = forward(tokens).flatten(0, 1).float()
                loss = self._cross_entropy(logits, targets, reduction="none")
            if backward:
                loss.mean().backward()  # type: ignore[no-untyped-call]
                model.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        if self._device == "cuda":
            torch.cuda.synchronize()
        every = torch.cat(losses).view(n_rows, T).to("cpu", torch.float32).contiguous()
        return (n_rows, T, 0), _memory_of(every)

    # --- what they have in common -------------------------------------------------------------

    def _tokens(self, raw: bytes, shape: tuple[int, int]) -> Tensor:
        torch = self._torch
        tokens: Tensor = torch.frombuffer(bytearray(raw), dtype=torch.int32).view(shape)
        return tokens.to(self._device, torch.int64)

    def _forward(self, model: nn.Module, tokens: Tensor) -> Tensor:
        before = [parameter._version for parameter in model.parameters()]
        logits: Tensor = model(tokens)
        if not isinstance(logits, self._torch.Tensor):
            raise Misbehaviour(NO_TENSOR)
        if before != [parameter._version for parameter in model.parameters()]:
            raise Misbehaviour(CHANGED_WEIGHTS)
        return logits

    def _load(self, trainable: bool) -> nn.Module:
        """Rebuild the model, load the checkpoint's weights into it, and make sure that all fit."""
        code = str(self._folder / "code")
        if code not in sys.path:
            sys.path.insert(0, code)
        build_model = importlib.import_module("model").build_model
        arguments = loads((self._folder / "in" / "model.json").read_text(encoding="utf-8"))
        model: nn.Module = build_model(arguments).to(self._device)
        weights: dict[str, Tensor] = self._load_file(self._folder / "in" / "model.safetensors")
        missing, unexpected = model.load_state_dict(weights, strict=False)
        if unexpected:
            raise KeyError(f"the model has no {', '.join(unexpected[:5])}, the checkpoint has")
        # A tied weight stands in the checkpoint once and in the model under two names.
        tensors = model.state_dict(keep_vars=True)
        loaded = {tensors[name].data_ptr() for name in weights}
        if absent := [name for name in missing if tensors[name].data_ptr() not in loaded]:
            raise KeyError(f"the checkpoint lacks {', '.join(absent[:5])}")
        self._names = tuple(weights)
        for parameter in model.parameters():
            parameter.requires_grad_(trainable and parameter.is_floating_point())
        return model.eval()

    def _trainable(self) -> nn.Module:
        if self._trained is None:
            self._trained = self._load(trainable=True)
        return self._trained

    def _compile(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        if self._compiled is None:
            compiler = os.environ.get("CXX", "g++")
            if self._device == "cpu" and shutil.which(compiler) is None:
                raise Misbehaviour(NO_COMPILER)
            self._compiled = self._torch.compile(model, dynamic=False)
        return self._compiled


# --- which matrices a forward pass uses ---------------------------------------------------------


def matrix_watch() -> Callable[[Mapping[str, Tensor], Tensor], Any]:
    """Return a class whose instances watch the matrix products of the code below them.

    Every tensor is known by its storage as one of three kinds: an activation (computed from the
    tokens), a weight (computed from parameters alone, so a cast, a slice or a concatenation of
    them still is one), or a constant.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class MatrixWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __init__(self, weights: Mapping[str, Tensor], tokens: Tensor) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.rows: dict[str, float] = {}
            self.activation_flops = 0.0
            self._sizes = {name: weight.numel() for name, weight in weights.items()}
            self._roots: dict[int, frozenset[str]] = {}
            self._active = {self._place(tokens)}
            self._kept: list[Any] = []  # a freed storage's address would be taken by another
            for name, weight in weights.items():
                place = self._place(weight)
                self._roots[place] = self._roots.get(place, frozenset()) | {name}

        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            # Skipping it costs two seconds of imports, and nothing is compiled in here anyway.
            return False

        @staticmethod
        def _place(tensor: Tensor) -> int:
            return tensor.untyped_storage().data_ptr()

        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            inputs = _tensors_in((args, kwargs or {}))
            self._count(func.overloadpacket.__name__, [a for a in args if _is_tensor(a)], result)
            active = any(self._place(tensor) in self._active for tensor in inputs)
            roots: frozenset[str] = frozenset().union(
                *(self._roots.get(self._place(tensor), frozenset()) for tensor in inputs)
            )
            for tensor in _tensors_in(result):
                self._kept.append(tensor.untyped_storage())
                if active:
                    self._active.add(self._place(tensor))
                elif roots:
                    self._roots[self._place(tensor)] = roots
            return result

        def _count(self, name: str, tensors: list[Tensor], result: Any) -> None:
            if name in ("mm", "bmm"):
                self._product(tensors[0], tensors[1])
            elif name in ("addmm", "baddbmm", "_addmm_activation"):
                self._product(tensors[1], tensors[2])
            elif name == "mv":
                self._product(tensors[0], tensors[1].unsqueeze(1))
            elif name == "convolution":
                x, kernel = tensors[:2]
                positions = result.shape[0] * result[0, 0].numel()
                self._use(x, kernel, positions)
            elif name == "mkldnn_rnn_layer":
                x, *matrices = tensors[:3]
                for matrix in matrices:
                    self._use(x, matrix, x.shape[0] * x.shape[1])
            elif name.startswith("_scaled_dot_product") and "backward" not in name:
                q, k, v = tensors[:3]  # (B, H, T, D) each; a causal half counts as a whole
                pairs = q.shape[:-1].numel() * k.shape[-2]
                self.activation_flops += 2.0 * pairs * (q.shape[-1] + v.shape[-1])

        def _product(self, a: Tensor, b: Tensor) -> None:
            """Count one product of matrices (..., m, k) and (..., k, n)."""
            if self._place(a) in self._active and self._place(b) in self._active:
                self.activation_flops += 2.0 * a.numel() * b.shape[-1]
            elif self._place(a) in self._active:
                self._use(a, b, a.shape[-2])
            else:
                self._use(b, a, b.shape[-1])

        def _use(self, x: Tensor, matrix: Tensor, n_rows: int) -> None:
            """Count a weight's product with so many rows of activations.

            A matrix made of several parameters, or of a part of one, counts with its own size.
            """
            roots = self._roots.get(self._place(matrix))
            if roots is None or self._place(x) not in self._active:
                return
            share = matrix.numel() / sum(self._sizes[name] for name in roots)
            for name in roots:
                self.rows[name] = self.rows.get(name, 0.0) + n_rows * share

    def _is_tensor(value: Any) -> bool:
        return isinstance(value, torch.Tensor)

    def _tensors_in(value: Any) -> list[Tensor]:
        if isinstance(value, torch.Tensor):
            return [value]
        if isinstance(value, dict):
            value = tuple(value.values())
        if isinstance(value, list | tuple):
            return [tensor for item in value for tensor in _tensors_in(item)]
        return []

    return MatrixWatch


# --- frames -------------------------------------------------------------------------------------


def _memory_of(tensor: Tensor) -> memoryview:
    """Return what a tensor on the CPU holds, without a copy."""
    n_bytes = tensor.numel() * tensor.element_size()
    memory = (ctypes.c_char * n_bytes).from_address(tensor.data_ptr())
    memory._tensor = tensor  # type: ignore[attr-defined]  # the view keeps it alive
    return memoryview(memory).cast("B")


def _read(reader: BinaryIO, n_bytes: int) -> bytes:
    """Read exactly so many bytes, or none if the other side has closed its end."""
    parts: list[bytes] = []
    while n_bytes:
        part = reader.read(n_bytes)
        if not part:
            return b""
        parts.append(part)
        n_bytes -= len(part)
    return b"".join(parts)


def _write(writer: BinaryIO, content: bytes | memoryview) -> None:
    view = memoryview(content)
    while view:
        view = view[writer.write(view) or 0 :]
