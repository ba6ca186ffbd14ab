"""What a projected gradient of every example costs, against the training step it stands in for and the usual way.

    ENSEMBLELORA_DATA=../shared/data python benchmarks/features.py --json

The same model, LoRA in every layer, the same batches of eight rows of one length. Each system runs in a process of its
own and in turn; rates are of real tokens.

* ``features``: every example's own gradient, projected to 400 numbers.
* ``step``: a plain fine-tuning step on the batch, of transformers and PEFT: forward, backward, AdamW.
* ``own-step``: the step that a run of this software takes, which computes the low-rank terms differently.
* ``loop``: one backward pass an example over the batch's graph, the gradient laid out and multiplied with a stored
  dense projection, as the paper's authors do.
* ``memory``: the most memory that projecting takes on top of the gradients, for 0.4 and 40 million coordinates.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common import Journal, finish_worker, keep_record, load_model, load_rows, make_parser, spread

MAX_LENGTH, EXAMPLES, PROJ_DIM = 256, 8, 400
SYSTEMS = ("features", "step", "own-step", "loop")
SIZES = {"0.4M": 400_000, "40M": 40_000_000}
MODULE = 2**17
"""coordinates of one module of the memory measurement"""
HELD = ExitStack()
"""what stays on for the life of a worker"""


def main() -> None:
    """Measure every system in turn, several times."""
    parser = make_parser(__doc__, rows=16, repeats="repeats", n_repeats=3)
    arguments = parser.parse_args()
    if arguments.worker:
        measure = measure_memory if arguments.worker in SIZES else measure_rate
        finish_worker(measure(arguments.worker, arguments.rows))
        return
    journal = Journal(Path(__file__).parent / ".journal" / "features.jsonl", fresh=arguments.fresh)
    rows = ["--rows", str(arguments.rows)]
    found: dict[str, list[dict[str, Any]]] = {system: [] for system in SYSTEMS}
    for repeat in range(arguments.repeats):
        for system in SYSTEMS:
            found[system].append(journal.measure(__file__, [system, *rows, "--seed", str(repeat)]))
    memory = {size: journal.measure(__file__, [size, *rows]) for size in SIZES}
    config = {"rows_per_task": arguments.rows, "examples": EXAMPLES, "proj_dim": PROJ_DIM, "repeats": arguments.repeats}
    keep_record("features", config | {"max_length": MAX_LENGTH}, compare(found, memory), as_json=arguments.json)


def compare(found: dict[str, list[dict[str, Any]]], memory: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Ratios, repeat by repeat."""

    def ratios(other: str) -> list[float]:
        both = zip(found["features"], found[other], strict=True)
        return [ours["tokens_per_second"] / theirs["tokens_per_second"] for ours, theirs in both]

    several = {
        "ratio_to_train_step": ratios("step"),
        "ratio_to_own_train_step": ratios("own-step"),
        "ratio_to_sample_loop": ratios("loop"),
    }
    return {
        **{name: statistics.median(values) for name, values in several.items()},
        "projection_extra_bytes": max(entry["extra_bytes"] for entry in memory.values()),
        "projection_extra_bytes_by_coordinates": {size: entry["extra_bytes"] for size, entry in memory.items()},
        "spread": {name: spread(values) for name, values in several.items()},
        "systems": {
            name: {key: spread([entry[key] for entry in entries]) for key in entries[0]}
            for name, entries in found.items()
        },
    }


def measure_rate(system: str, n_rows: int) -> dict[str, Any]:
    """Run one system over all batches, after one of them to warm up."""
    from ensemblelora.adapters import attach
    from ensemblelora.config import AdapterConfig
    from ensemblelora.data.batching import collate

    base = load_model(MAX_LENGTH)
    rows = load_rows(base, n_train=n_rows, n_validation=1, n_test=1, max_length=MAX_LENGTH, seed=0)
    adapted = attach(base, AdapterConfig(), seed=0)
    # Two-class tasks of one row an example: there a gradient pass is one backward pass, like a training step.
    splits = [split for split in rows.train if split.kind == "verbalizer" and int(split.n_choices.max()) == 2]
    batches = []
    for split in splits:
        order = split.example_lengths.argsort(kind="stable")
        for first in range(0, len(order) - EXAMPLES + 1, EXAMPLES):
            batches.append(collate([(split, int(e)) for e in order[first : first + EXAMPLES]], base.pad_token_id))
    make = {"features": make_features, "step": make_step, "own-step": make_own_step, "loop": make_loop}[system]
    run = make(adapted, batches)
    for batch in batches[:2]:
        run(batch)
    started = time.perf_counter()
    for batch in batches:
        run(batch)
    seconds = time.perf_counter() - started
    n_tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
    return {"seconds": seconds, "n_batches": len(batches), "tokens_per_second": n_tokens / seconds}


def make_features(adapted: Any, batches: Any) -> Callable[[Any], object]:
    """The features stage's own pass."""
    from ensemblelora.adapters import THETA0, trainable_layers
    from ensemblelora.gradients.collect import compute_features
    from ensemblelora.gradients.projection import Projector

    projector = Projector("rademacher", PROJ_DIM, 0)
    linears = {name: layer for name, layer in trainable_layers(adapted, THETA0).items() if "lora_B" in name}
    return lambda batch: compute_features(adapted, linears, projector, batch, "margin")


def make_step(adapted: Any, batches: Any) -> Callable[[Any], object]:
    """Transformers and PEFT as they are: logits at the scored positions alone, the labels' cross-entropy, AdamW."""
    import torch

    network, optimizer = _make_trainable(adapted)

    def step(batch: Any) -> None:
        ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)
        hidden = network.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        positions = torch.from_numpy(batch.positions)
        logits = network.get_output_embeddings()(hidden[positions[:, 0], positions[:, 1]]).float()
        wanted = logits.gather(1, torch.from_numpy(batch.label_tokens))
        torch.nn.functional.cross_entropy(wanted, torch.from_numpy(batch.labels)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_own_step(adapted: Any, batches: Any) -> Callable[[Any], object]:
    """The training stage's pass, without what surrounds it."""
    from ensemblelora.adapters import THETA0
    from ensemblelora.fusion import fused
    from ensemblelora.passes import score
    from ensemblelora.scoring import cross_entropy

    _, optimizer = _make_trainable(adapted)
    HELD.enter_context(fused(adapted, [THETA0]))

    def step(batch: Any) -> None:
        cross_entropy(score(adapted, batch).z, batch, loss="label_softmax").mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_loop(adapted: Any, batches: Any) -> Callable[[Any], object]:
    """One example after the other over the batch's graph; all adapter weights, as the authors take them."""
    import torch

    from ensemblelora.gradients.output import compute_outputs
    from ensemblelora.passes import score

    network, _ = _make_trainable(adapted)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    size = sum(parameter.numel() for parameter in parameters)
    generator = torch.Generator().manual_seed(0)
    projection = torch.randint(0, 2, (size, PROJ_DIM), generator=generator, dtype=torch.float32) * 2 - 1
    projection /= PROJ_DIM**0.5

    def collect(batch: Any) -> torch.Tensor:
        z = score(adapted, batch).z
        labels, n_choices = torch.from_numpy(batch.labels), torch.from_numpy(batch.n_choices)
        outputs = compute_outputs(z, labels, n_choices, "margin")[:, 0]
        rows = []
        for i, output in enumerate(outputs):
            gradients = torch.autograd.grad(output, parameters, retain_graph=i < len(outputs) - 1)
            rows.append(torch.cat([gradient.flatten() for gradient in gradients]) @ projection)
        return torch.stack(rows)

    return collect


def measure_memory(size: str, n_rows: int) -> dict[str, Any]:
    """Project the gradients of four examples, module by module, and see how far the process's peak rises."""
    import torch

    from ensemblelora.gradients.projection import Projector

    projector, shape = Projector("rademacher", PROJ_DIM, 0), (MODULE // 16, 16)
    gradients = torch.randn(4, *shape)
    Projector("rademacher", 8, 0).project("warm-up", torch.randn(1, 8, 8))
    n_modules = -(-SIZES[size] // MODULE)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    total = torch.zeros(4, PROJ_DIM)
    for module in range(n_modules):
        total += projector.project(f"module {module}", gradients)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"extra_bytes": (after - before) * 1024, "n_coordinates": n_modules * MODULE}


def _make_trainable(adapted: Any) -> tuple[Any, Any]:
    import torch

    from ensemblelora.adapters import THETA0, activate

    HELD.enter_context(activate(adapted, THETA0, trainable=True))
    adapted.peft.train()
    parameters = [parameter for parameter in adapted.peft.parameters() if parameter.requires_grad]
    return adapted.network, torch.optim.AdamW(parameters, lr=1e-4)


if __name__ == "__main__":
    main()
