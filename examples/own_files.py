"""From CSV files to predictions: plan, run, predict.

python examples/own_files.py                        # three small tasks are made; SmolLM2-135M; minutes
python examples/own_files.py --folder tickets/ --model some/model --ask billing "I was charged twice."
"""

from __future__ import annotations

import argparse

import ensemblelora
from make_tasks import write_tasks


def main() -> None:
    """Plan, fine-tune, and answer one question."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="one CSV or JSONL file a task; by default three are made in tasks/")
    parser.add_argument("--model", default="smollm2-135m", help="a hub id, a folder, a .gguf file, or smollm2-135m")
    parser.add_argument("--out", default="runs/own-files", help="the run folder")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as on the command line")
    parser.add_argument("--ask", nargs=2, default=("reviews", "A joy from start to end."), metavar=("TASK", "TEXT"))
    given = parser.parse_args()

    folder = given.folder or write_tasks("tasks")
    config = ensemblelora.read_request(folder, (f"model.name={given.model}", f"out={given.out}", *given.set))

    planned = ensemblelora.run(config, until="group")  # gradients, predicted losses, groups; nothing is trained yet
    print(f"plan: {planned.plan['decision']}. {planned.plan['reason']}")

    finished = ensemblelora.run(config)  # goes on where the plan ended
    for method, scores in finished.results["methods"].items():
        print(f"{method}: mean test loss {scores['mean']['nll']:.3f}")
    print(f"report: {finished.report}")

    task, text = given.ask
    answer = ensemblelora.load_run(finished.folder).predict(task, [text])[0]
    print(f"{text} -> {answer.label}")


if __name__ == "__main__":
    main()
