"""What would training these tasks together give? Asked of every pair, without training any.

python examples/ask_the_oracle.py                   # three small tasks are made; SmolLM2-135M; a minute or two
"""

from __future__ import annotations

import argparse
from itertools import combinations

import ensemblelora
from make_tasks import write_tasks


def main() -> None:
    """Take features, then print each task's predicted loss alone and beside each other task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="one CSV or JSONL file a task; by default three are made in tasks/")
    parser.add_argument("--model", default="smollm2-135m", help="a hub id, a folder, a .gguf file, or smollm2-135m")
    parser.add_argument("--out", default="runs/oracle", help="the run folder")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as on the command line")
    given = parser.parse_args()

    folder = given.folder or write_tasks("tasks")
    config = ensemblelora.read_request(folder, (f"model.name={given.model}", f"out={given.out}", *given.set))
    run = ensemblelora.load_run(ensemblelora.run(config, until="affinity").folder)

    names = list(run.cards)
    base, alone = run.ask([]), {name: run.ask([name])[name] for name in names}
    for name in names:
        print(f"{name}: base model {base[name]['nll']:.3f} nats, alone {alone[name]['nll']:.3f}")
    for pair in combinations(names, 2):
        together = run.ask(pair)
        for name in pair:
            other = pair[1] if name == pair[0] else pair[0]
            gain = alone[name]["nll"] - together[name]["nll"]
            print(f"{name} with {other}: {gain:+.3f} nats better than alone, on {together[name]['n_validation']} rows")


if __name__ == "__main__":
    main()
