"How often the answers that were chosen are the shortest or the longest of their item, by sums and by length-normalised sums."

import argparse

import numpy as np
import pandas as pd

from dora_nb.data.tasks import load_task
from dora_nb.results.stored import read_report


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", default="reports/main/large")
    parser.add_argument("--task", default="hellaswag")
    options = parser.parse_args()
    found, items = read_report(options.report), load_task(options.task, "validation")
    lengths = {item["doc_index"]: [len(text) for text in item["continuations"]] for item in items}
    ends = {i: (int(np.argmin(n)), int(np.argmax(n))) for i, n in lengths.items()}
    rows = []
    for r in found.results:
        if (r["params"]["task"], r["params"]["eval_split"]) != (options.task, "validation"):
            continue
        answers = found.predictions[found.predictions.run == r["run"]]
        short, long = np.array([ends[i] for i in answers.doc_index]).T
        for metric, chosen in (("right", "gold"), ("sum", "pred"), ("normalised", "pred_norm")):
            shares = dict(shortest=(answers[chosen] == short).mean(), longest=(answers[chosen] == long).mean())
            rows.append(dict(method=r["params"]["method"], metric=metric) | shares)
    shares = 100 * pd.DataFrame(rows).groupby(["method", "metric"], sort=False).mean()
    print(shares.reset_index().to_markdown(index=False, floatfmt=".1f"))


if __name__ == "__main__":
    main()
