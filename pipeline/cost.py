"""What a scale's trials would cost on one GPU: a projection from shapes, counts and a few constants, no measurement.

Axes: T time steps (padding included), B batch rows, n input size, m hidden size, k filter width, V vocabulary,
S source steps. Matrix products are counted by formula; `tests/test_cost.py` holds the formulas against torch's own
counter. Elements are float32 throughout, as in precision tf32.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline import ledger, paths
from pipeline.errors import UserError
from pipeline.params import Cell, NbsvmRecipe, Params, Recipe
from pipeline.processed import MANIFEST, Processed
from pipeline.tasks import Task, task_class
from pipeline.tasks.base import Shape
from qrnn.layer import POOLINGS, QRNNLayer
from qrnn.variational import VariationalLayer, sampled_masks

# The device: one NVIDIA H200 (SXM, 141 GB).
PEAK = 495e12  # FLOP/s of dense TF32: half of the datasheet's dense bfloat16 rate, about 990e12
EFFICIENCY = 0.3  # share of PEAK that products of these shapes reach; assumed (8192^3 in bfloat16 reaches 0.8)
BANDWIDTH = 4.3e12  # bytes/s read and written by a device-to-device copy, measured; the datasheet says 4.8e12
LAUNCH_S = 5e-6  # seconds a kernel launch takes of eager torch's host thread; assumed

# Kernel launches, estimated by reading the code; nothing is captured in CUDA graphs.
LAYER_LAUNCHES = 12  # of a QRNN layer besides its k products: pooling, masks, tail, last step, dropout, concatenation
RECURRENT_LAUNCHES = 2  # of cuDNN's LSTM for each time step: recurrent product and gates; persistent kernels need less
LOOP_LAUNCHES = 10  # of a variational LSTM for each time step, where noise keeps it from cuDNN's kernels
LSTM_LAUNCHES = 10  # of an LSTM layer besides its steps: input product, shutting padding out, last step, dropout
ENDS_LAUNCHES = 20  # of embedding, output layer and loss, and of copying a batch to the device
ATTENTION_LAUNCHES = 8  # of eq. 8
BEAM_LAUNCHES = 40  # of one step of beam search besides the decoder: scores, sorting, reordering, waits for the host
OPTIMISER_LAUNCHES = 20  # of clipping and the optimiser's fused or grouped kernels

FLOAT = 4  # bytes
POOL_ELEMENTS = (5, 8)  # of T x B x m that pooling reads and writes, forward and backward
OPTIMISER_ELEMENTS = {"sgd": 2, "rmsprop": 4, "adam": 6}  # weight and each moment, read and written
TARGET_MINUTES = 30.0  # GPU-minutes for all cells of a scale, one seed


@dataclass(frozen=True)
class Work:
    """FLOPs of matrix products (a multiply-add is 2), float32 elements read or written at least, kernel launches."""

    forward: float = 0.0
    backward: float = 0.0
    elements: float = 0.0
    launches: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.forward + other.forward,
            self.backward + other.backward,
            self.elements + other.elements,
            self.launches + other.launches,
        )

    def times(self, count: float) -> "Work":
        return Work(self.forward * count, self.backward * count, self.elements * count, self.launches * count)

    @property
    def seconds(self) -> float:
        """The largest of the times that arithmetic, memory and launches need."""
        flops = (self.forward + self.backward) / (PEAK * EFFICIENCY)
        return max(flops, self.elements * FLOAT / BANDWIDTH, self.launches * LAUNCH_S)


def products(inputs: float, size_in: int, size_out: int, train: bool) -> Work:
    """(inputs, size_in) times (size_in, size_out): backward is two such products, one for each operand."""
    flops = 2.0 * inputs * size_in * size_out
    elements = inputs * (size_in + size_out)
    return Work(flops, 2 * flops * train, elements * (1 + 2 * train))


def layer_work(layer: nn.Module, rows: int, steps: int, train: bool) -> Work:
    """One layer over (T, B, n)."""
    return (qrnn_layer if isinstance(layer, QRNNLayer) else lstm_layer)(layer, rows, steps, train)  # type: ignore[operator]


def qrnn_layer(layer: QRNNLayer, rows: int, steps: int, train: bool) -> Work:
    """k products of offset views (a filter j steps off meets T - j inputs), pooling, and V h of eq. 7."""
    width, columns = layer.kernel_size, len(POOLINGS[layer.pooling]) * layer.hidden_size
    left = width - 1 if layer.causal else width - 1 - (width - 1) // 2
    met = sum(max(0, steps - abs(j - left)) for j in range(width))
    flops = products(met * rows, layer.input_size, columns, train)
    traffic = products(steps * rows, layer.input_size, columns, train)  # offset views lie in the cache
    pooled = sum(POOL_ELEMENTS[: 1 + train]) * steps * rows * layer.hidden_size
    work = Work(flops.forward, flops.backward, traffic.elements + pooled, (width + LAYER_LAUNCHES) * (1 + 2 * train))
    if layer.context_weight is not None:
        work += products(rows, layer.context_weight.shape[0], columns, train)
    return work


def lstm_layer(layer: nn.LSTM, rows: int, steps: int, train: bool) -> Work:
    """Input product over all steps, then a recurrent product at each; the first state's gradient is counted too.

    A variational layer runs as it would in the mode it is in: the fused kernels, or step by step.
    """
    count, size = steps * rows, layer.hidden_size
    into, recurrent = (products(count, n, 4 * size, train) for n in (layer.input_size, size))
    each = LOOP_LAUNCHES if isinstance(layer, VariationalLayer) and not layer.fused else RECURRENT_LAUNCHES
    return into + recurrent + Work(launches=(each * steps + LSTM_LAUNCHES) * (1 + train))


def stack_work(stack: Any, rows: int, steps: int, train: bool) -> Work:
    return sum((layer_work(layer, rows, steps, train) for layer in stack.layers), Work())


def batch_work(model: Any, shape: Shape, train: bool) -> Work:
    """The model over one batch, loss included, optimiser not."""
    rows, steps = shape.rows, shape.steps
    outputs = rows if model.output.out_features == 2 else rows * steps  # a classifier reads the last step alone
    logits = Work(elements=(2 + 2 * train) * outputs * model.output.out_features)  # of the loss
    ends = Work(launches=ENDS_LAUNCHES * (1 + train))
    output = products(outputs, model.output.in_features, model.output.out_features, train) + logits + ends
    if not shape.source:
        return stack_work(model.stack, rows, steps, train) + output
    read = stack_work(model.encoder, rows, shape.source, train)
    return read + stack_work(model.decoder, rows, steps, train) + attention(model, shape, train) + output


def attention(model: Any, shape: Shape, train: bool) -> Work:
    """Eq. 8: queries times keys, weights times keys, W_k and W_c; mask and softmax pass over (B, T, S)."""
    rows, steps, size = shape.rows, shape.steps, model.output.in_features
    two = products(rows * steps, size, shape.source, train) + products(rows * steps, shape.source, size, train)
    keys = Work(elements=2.0 * rows * shape.source * size, launches=ATTENTION_LAUNCHES)
    weights = Work(elements=4.0 * rows * steps * shape.source)
    return two + (keys + weights).times(1 + train) + products(rows * steps, size, size, train).times(2)


def weight_work(model: nn.Module, recipe: Recipe | None) -> Work:
    """Weights read forward; with a recipe also backward, gradients written and read, clipping and the optimiser.

    Rows of an embedding are looked up, not read through, but its gradient is dense.
    """
    total = parameter_count(model)
    read = total - sum(part.weight.numel() for part in set(model.modules()) if isinstance(part, nn.Embedding))
    if recipe is None:
        return Work(elements=read)
    clipping = 0 if recipe.clip_norm is None else 3  # read for the norm, read and written to rescale
    updated = (2 + clipping + OPTIMISER_ELEMENTS[recipe.optimiser]) * total
    return Work(elements=2 * read + updated, launches=OPTIMISER_LAUNCHES)


def beam_work(model: Any, shape: Shape, width: int) -> Work:
    """Beam search of a batch, every beam kept to the end of its batch's longest reference."""
    step = batch_work(model, Shape(shape.rows * width, 1, shape.source), False)
    step += stack_work(model.encoder, shape.rows * width, shape.source, False).times(-1)  # the source is read once
    step += weight_work(model, None) + Work(launches=BEAM_LAUNCHES)
    return stack_work(model.encoder, shape.rows, shape.source, False) + step.times(shape.steps)


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass(frozen=True)
class Batches:
    """The batches of a trial: of one epoch's training and validation, of the test, its beam search, its MC samples."""

    train: list[Shape]
    valid: list[Shape]
    test: list[Shape]
    beam: list[Shape]
    sampled: list[Shape]


def batches(task: Task) -> Batches:
    """In one random order."""
    scored = [task.evaluation_shapes(test=test) for test in (False, True)]
    return Batches(task.shapes(np.random.default_rng(0)), *scored, task.decoding_shapes(), task.sampled_shapes())


@dataclass(frozen=True)
class Projection:
    """One cell: its mean training step, and minutes of one trial's training, validation, test and beam search."""

    cell: Cell
    parameters: int
    steps: int
    epochs: int
    step: Work
    minutes: tuple[float, float, float, float]
    measured: float | None


def project(params: Params, cell: Cell) -> Projection:
    """Raises UserError where the cell's data are not processed yet."""
    folder = paths.processed(cell.scale, cell.task)
    if not (folder / MANIFEST).is_file():
        options = f"--scale {cell.scale} --task {cell.task}"
        raise UserError(
            f"{folder}: expected processed data, found none; "
            f"`python -m stages.fetch {options} && python -m stages.preprocess {options}` makes them"
        )
    recipe, data = params.task(cell.scale, cell.task).recipes[cell.model], Processed(folder)
    task = task_class(cell.task)(data, recipe, torch.device("meta"))
    with torch.device("meta"):  # shapes are enough
        model = task.model()
    found, update, read = batches(task), weight_work(model, recipe), weight_work(model, None)
    train = [batch_work(model, shape, True) + update for shape in found.train]
    model.eval()
    scored = [[batch_work(model, shape, False) + read for shape in part] for part in (found.valid, found.test)]
    with sampled_masks(model):
        scored[-1] += [batch_work(model, shape, False) + read for shape in found.sampled]
    width = getattr(recipe, "beam_width", 1)
    parts = (train, *scored, [beam_work(model, shape, width) for shape in found.beam])
    times = [sum(work.seconds for work in part) / 60 for part in parts]
    return Projection(
        cell, parameter_count(model), len(train), recipe.epochs,
        sum(train, Work()).times(1 / max(1, len(train))),
        (times[0] * recipe.epochs, times[1] * recipe.epochs, times[2], times[3]),
        measured_minutes(cell),
    )  # fmt: skip


def measured_minutes(cell: Cell) -> float | None:
    """Minutes of training (validation apart) of the cell's first record made on a CUDA device, if there is one.

    Of all epochs at the median epoch's time, as the projection counts them; others may have trained beside it.
    """
    for record in ledger.records(cell.scale):
        mine = (record["task"], record["model"]) == (cell.task, cell.model)
        if mine and record["status"] == "done" and record["environment"]["device"] == "cuda":
            return record["timing"]["epoch_s"] * record["config"]["epochs"] / 60
    return None


def table(params: Params, scale: str) -> str:
    """The projection of every cell of a scale, totals, and the reasoning."""
    lines = [
        "PROJECTION, not a measurement: one NVIDIA H200, one trial at a time, all epochs run",
        f"{'cell':<21}{'parameters':>12}{'steps':>7}{'epochs':>7}{'GFLOP fwd':>11}{'bwd':>8}{'MB':>8}{'launches':>9}"
        f"{'train':>8}{'valid':>7}{'test':>7}{'beam':>7}{'minutes':>9}  {'bound by':<11}measured",
    ]
    seeds, total = len(params.seeds(scale)), 0.0
    for cell in params.cells(scale):
        if isinstance(params.task(cell.scale, cell.task).recipes[cell.model], NbsvmRecipe):
            continue  # fitted on a CPU
        found = project(params, cell)
        total += sum(found.minutes)
        lines.append(_line(found))
    verdict = "within" if total <= TARGET_MINUTES else "above"
    lines.append(
        f"one seed: {total:.1f} GPU-minutes, {verdict} the target of {TARGET_MINUTES:.0f}; "
        f"all {seeds} seeds: {seeds * total:.1f}"
    )
    return "\n".join([*lines, "", _reasoning()])


def _line(found: Projection) -> str:
    step = found.step
    causes = {
        "arithmetic": (step.forward + step.backward) / (PEAK * EFFICIENCY),
        "memory": step.elements * FLOAT / BANDWIDTH,
        "launches": step.launches * LAUNCH_S,
    }
    measured = "-" if found.measured is None else f"{found.measured:.1f}"
    train, valid, test, beam = found.minutes
    return (
        f"{f'{found.cell.task}/{found.cell.model}':<21}{found.parameters:>12,}{found.steps:>7}{found.epochs:>7}"
        f"{step.forward / 1e9:>11.1f}{step.backward / 1e9:>8.1f}"
        f"{step.elements * FLOAT / 1e6:>8.0f}{step.launches:>9.0f}"
        f"{train:>8.2f}{valid:>7.2f}{test:>7.2f}{beam:>7.2f}{sum(found.minutes):>9.2f}"
        f"  {max(causes, key=lambda cause: causes[cause]):<11}{measured}"
    )


def _reasoning() -> str:
    forward, backward = POOL_ELEMENTS
    return f"""\
FLOPs, bytes (MB) and launches are of the mean training step; train, valid, test, beam and minutes are of one trial.
measured: the median epoch of a record of the cell made on a CUDA device, validation apart, times all epochs; others may
  have trained beside it; - where there is none.
A batch takes the largest of
  FLOPs / ({PEAK / 1e12:.0f} TFLOP/s x {EFFICIENCY}): dense TF32, half the datasheet's bfloat16 rate; efficiency assumed
  bytes / ({BANDWIDTH / 1e12} TB/s): a measured copy
  launches x {LAUNCH_S * 1e6:.0f} us: assumed; where launches bind, the minutes are proportional to it
FLOPs: matrix products of padded batches; backward is twice forward.
Bytes: operands and results of products once, pooling {forward} elements forward and {backward} backward of T x B x m,
  weights, gradients, optimiser; no other temporaries, so a floor.
Launches, estimated, of a batch:
  QRNN layer: k + {LAYER_LAUNCHES} forward, twice that backward
  LSTM layer: {RECURRENT_LAUNCHES} a time step + {LSTM_LAUNCHES}, the same backward; a variational one with noise:
    {LOOP_LAUNCHES} a time step
  {ENDS_LAUNCHES} embedding, output and loss, {ATTENTION_LAUNCHES} attention, the same backward
  {OPTIMISER_LAUNCHES} optimiser
  beam search: {BEAM_LAUNCHES} a step besides the model
LSTM steps run in sequence and pooling scans T in one kernel: their latency is in no figure but the launches.
All epochs are counted, also where early stopping may end sooner. Beam search goes to the longest reference of each
batch, all beams kept. Left out: compiling kernels, start-up, checkpoints, the host's reading of the data."""
