"Writes reports/reliability/report.md from what faults.py, soak.py and the fault tests (pytest --junitxml) left there."

import json
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

from benchmarks.common import table, write_text

HERE = Path(__file__).parents[2] / "reports" / "reliability"
TINY = {  # test → the fault that it injects, and what it checks besides
    r"test_killed.*(launcher|moments\[(0|3|6|9|12|15|18)\])": "SIGKILL of the launcher at a random moment",
    r"test_killed.*(papermill|moments\[(1|4|7|10|13|16|19)\])": "SIGKILL of a papermill process at a random moment",
    r"test_killed.*(kernel|moments\[(2|5|8|11|14|17)\])": "SIGKILL of a kernel at a random moment",
    r"test_faults.*test_told_to_stop": "Ctrl-C and SIGTERM of the launcher",
    r"test_two_launchers": "two launchers on one grid at once",
    r"test_deaths_are_tried": "a process that dies, raises or hangs (timeout), once and always",
    r"test_a_lost_machine": "a Ray node killed in mid-run",
    r"test_a_full_disk": "a full disk before the start (tmpfs)",
    r"test_a_disk_that_fills": "a disk that fills in mid-run (tmpfs)",
    r"test_nowhere_to_write": "an output folder that cannot be written to",
    r"test_a_result_that_is_none": "a result.json that is empty, truncated, or foreign",
    r"test_a_loss_that_is_no_number": "a loss that is not a number",
    r"test_parameters_are_data": "parameters that are code",
    r"test_names_that_lead_elsewhere": "file names from another machine that lead out of the folder",
    r"test_a_damaged_checkpoint": "a checkpoint that is empty, truncated, or has a bit flipped",
    r"test_stopped_at_any_moment": "SIGTERM at random moments of a training (three each, eight trainings)",
    r"test_stopped_in_the_middle": "SIGTERM and SIGINT inside a step",
    r"test_out_of_memory_halves": "out of memory, which halves the micro-batch",
    r"test_team.*test_a_process_is_killed": "SIGKILL of one of two processes of a run, or of their kernel",
    r"test_team.*test_told_to_stop": "SIGTERM of a run of two processes",
    r"test_team.*test_an_error_in_one": "an error in a run of two processes",
    r"test_damage_is_noticed|test_a_damaged_file|test_a_wrong_checksum": "a cached or fetched file that is damaged",
}


def tests_from(paths):
    "Fault → how often it was injected and how often its test failed, from pytest's XML."
    found = {}
    for path in paths:
        for case in ET.parse(path).getroot().iter("testcase"):
            name = f"{case.get('classname')}::{case.get('name')}"
            fault = next((words for pattern, words in TINY.items() if re.search(pattern, name)), None)
            if fault is None or case.find("skipped") is not None:
                continue
            times, failed = found.get(fault, (0, 0))
            found[fault] = times + 1, failed + (case.find("failure") is not None or case.find("error") is not None)
    return found


KINDS = {  # of attacks, as the tests mark them
    "data loss": "lose a file, of the user's or of a finished run",
    "silent error": "get a wrong figure without a word",
    "hostile input": "run foreign code, write elsewhere, or break a page by names and files from outside",
    "hang": "wait for ever",
    "crash": "end without a sentence that names the file and says what to do",
}


def attacks_from(paths):
    "Kind of attack → how many were tried, and how many held, from pytest's XML; each test counts once."
    found = {}
    for path in paths:
        for case in ET.parse(path).getroot().iter("testcase"):
            kinds = [p.get("value") for p in case.iter("property") if p.get("name") == "attack"]
            if kinds and case.find("skipped") is None:
                held = case.find("failure") is None and case.find("error") is None
                found[case.get("classname"), case.get("name")] = kinds[0], held
    return {
        k: [sum(kind == k for kind, _ in found.values()), sum((k, True) == v for v in found.values())] for k in KINDS
    }


def main(junit=()):
    readers = {"tests": tests_from, "attacks": attacks_from}
    for path in map(Path, junit):  # tests.xml or attacks.xml
        write_text(path.with_name(f"{path.stem}.json"), json.dumps(readers[path.stem]([path]), indent=1))
    tests, attacks, faults, soak = (
        json.loads((HERE / f"{n}.json").read_text()) for n in ("tests", "attacks", "faults", "soak")
    )
    tried, held = (sum(n) for n in zip(*attacks.values()))
    injected = [
        {"fault": fault, "times injected": tests[fault][0], "tests that found something lost or wrong": tests[fault][1]}
        for fault in TINY.values()
        if fault in tests
    ]
    missing = sorted(set(TINY.values()) - set(tests))
    options, (calm, stormy) = faults["options"], faults["seconds"]
    times = sum(r["times"] for r in faults["rows"])
    same = sum(r["undisturbed"] == r["disturbed"] for r in faults["accuracy"])
    where, row = faults["machine"], soak["rows"][0]
    done = [int(n) for r in faults["rows"] for n in r["runs done when it came"].split(", ") if n]
    after = float(row["a run, s"]) / float(row["bare papermill, before and after, s"].split(", ")[1])
    text = f"""# Reliability

*Faults, injected on purpose: nothing finished may be lost, nothing half-done may count, and what comes out must be what an undisturbed grid gives. This page is written by `python -m benchmarks.reliability.report` from the JSON files beside it; `make reliability` makes them anew.*

## The real model

SmolLM2-135M-Instruct on three tasks, two methods and two seeds ({len(faults["accuracy"])} runs, {options["train"]} training and {options["eval"]} validation items each, dropout on, {options["workers"]} at a time, a checkpoint every 5 s) was made once undisturbed and once while something was killed about every {options["pause"]:.0f} s, {times} times in all. "Wrong" compares every run's metrics, answers (log-likelihoods to the last bit), history and adapter with the undisturbed grid's; "lost or made again" compares each result.json that existed when the fault came with the one at the end, byte by byte. {done.count(0)} of the faults came before any run had finished, and at the others at most {max(done)} had. So this column says little; the tiny models below test many more finished runs.

{table(faults["rows"], faults["columns"])}

{same} of {len(faults["accuracy"])} accuracies are equal, {len(faults["wrong"])} runs differ in anything at all, {faults["processes_left"]} processes were left behind. The undisturbed grid took {calm / 60:.0f} min, the disturbed one {stormy / 60:.0f} min. ({where["device"]}, {where["count"]} threads, torch {where["torch"]}; `benchmarks/reliability/faults.py`.)

{table([r | {"disturbed": f"{r['disturbed']:.4f}", "undisturbed": f"{r['undisturbed']:.4f}"} for r in faults["accuracy"]], ["run", "undisturbed", "disturbed"])}

## Attacks

What a stranger's machine, files and habits can do to the package. Every attack is a test that is marked as one; it holds if nothing was lost, the right figure or a clear refusal came out, and the command ended. {held} of {tried} held.

{table([{"what it tries": words, "tried": attacks[k][0], "held": attacks[k][1]} for k, words in KINDS.items()], ["what it tries", "tried", "held"])}

## Tiny models, every fault

The tests of the same name in `tests/` (the twenty random moments behind `make test-slow`). Each checks what its fault could break: those on grids compare the final table with an undisturbed one, those on a training its history and its parameters to the bit, the others that nothing broken is taken for whole.

{table(injected, list(injected[0]))}
{f"Not run this time: {', '.join(missing)}." if missing else ""}
## A soak

{soak["rows"][0]["runs"]} runs of a model that takes no time, so that nearly all of it is start-up: what the launcher adds, what it holds, what it leaves.

{table([{"": k, "value": v} for k, v in soak["rows"][0].items()], ["", "value"])}

The target was at most 10 % over bare papermill calls, as many at a time. Those were timed before and after, {soak["options"]["bare"]} runs each; against the later ones alone the ratio is {after:.2f}.
"""
    write_text(HERE / "report.md", text)


if __name__ == "__main__":
    main(sys.argv[1:])
