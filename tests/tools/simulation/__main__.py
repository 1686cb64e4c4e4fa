"""Simulates merges, one a seed, in every weather; a seed that breaks a promise is printed, and can be repeated.

python -m tests.tools.simulation --seeds 300
python -m tests.tools.simulation --seed 17 --trace      seed 17 again, event by event
python -m tests.tools.simulation --prove
"""

import argparse
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack

from tests.tools.simulation.protections import ENOUGH, PROTECTIONS, proof
from tests.tools.simulation.scenario import Seed, outcomes
from tests.tools.simulation.weather import FAULTS, TROUBLES

TOLD = 1000
"""Seeds between two lines of progress."""


def campaign(seeds: Iterable[int], seconds: float = float("inf")) -> int:
    """Run seeds one after the other, for at most so long; return how many broke a promise."""
    began, cpu = time.monotonic(), time.process_time()
    struck: Counter[str] = Counter()
    count = bad = runs = requests = 0
    simulated = 0.0
    for seed, outcome in outcomes(seeds):
        count, runs, requests = count + 1, runs + outcome.runs, requests + outcome.requests
        simulated += outcome.seconds
        struck.update(outcome.struck)
        if outcome.problems:
            bad += 1
            print(f"seed {seed} at {commit()}: {outcome.case}", *outcome.problems, sep="\n    ", flush=True)
        if count % TOLD == 0:
            print(f"{count:,} seeds, {bad} bad, {time.monotonic() - began:,.0f} s", flush=True)
        if time.monotonic() - began > seconds:
            break
    spent, worked = time.monotonic() - began, time.process_time() - cpu
    print(f"seeds {count:,}, broken promises {bad}, {spent:,.0f} s, of which {worked:,.0f} s CPU")
    print(f"simulated {simulated / 3600:,.1f} h: {runs:,} runs of the command, {requests:,} requests")
    print(", ".join(f"{kind} {struck[kind]:,}" for kind in (*FAULTS, *TROUBLES)))
    return bad


def commit() -> str:
    """Return the commit that is checked out."""
    asked = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return asked.stdout.strip() or "no commit"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 where a promise was broken."""
    parser = argparse.ArgumentParser(description="Simulates merges under faults; every promise must hold.")
    parser.add_argument("--seeds", type=int, default=300, help="how many")
    parser.add_argument("--first", type=int, default=1, help="the first of them")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no more seeds after so long")
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument("--trace", action="store_true", help="print each event")
    parser.add_argument("--without", choices=PROTECTIONS, help="a protection to switch off")
    parser.add_argument("--prove", action="store_true", help="show that each protection is missed when it is off")
    given = parser.parse_args(arguments)
    if given.prove:
        missed = [name for name in PROTECTIONS if not proof(name)]
        print(*(f"{name} was not missed within {ENOUGH} seeds" for name in missed), sep="\n")
        return 1 if missed else 0
    with ExitStack() as stack:
        if given.without:
            stack.enter_context(PROTECTIONS[given.without]())
        if given.seed is None:
            return 1 if campaign(range(given.first, given.first + given.seeds), given.minutes * 60) else 0
        outcome = Seed(given.seed, trace=print if given.trace else None).run()
        print(f"seed {given.seed} at {commit()}: {outcome.case}", *outcome.problems, sep="\n    ")
        print(f"{outcome.requests} requests, {outcome.seconds:.0f} s, digest {outcome.digest[:16]}")
    return 1 if outcome.problems else 0


if __name__ == "__main__":
    sys.exit(main())
