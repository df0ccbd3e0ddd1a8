"""Many random cases and what they find, or one case again; docs/reliability.md has the commands of `make fuzz`."""

import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from fuzzer import Case, Failure, Fuzzer, search  # noqa: E402


def main(words: list[str]) -> int:
    options = dict(word.split("=", 1) for word in words)
    folder = Path(tempfile.mkdtemp(prefix="trtbuild-fuzz-"))
    fuzzer = Fuzzer(folder)
    if options.get("CASE"):
        failure = fuzzer.check(Case.parse(options["CASE"]))
        print(failure.kind if failure else "nothing is wrong", folder / "case", sep="\n")
        if failure:
            print(failure.outcome.stdout[-2000:], failure.outcome.stderr[-8000:], sep="\n")
        fuzzer.close()
        return bool(failure)
    only = options.get("ONLY", "")
    fuzzer.originals = {name: value for name, value in fuzzer.originals.items() if name.startswith(only)}
    count, number = int(options.get("CASES") or 2000), int(options.get("SEED") or random.randrange(2**32))
    print(f"{count} cases, seed {number}", flush=True)
    failures: dict[str, list[str]] = {}
    start, done = time.monotonic(), 0

    def see(case: Case, failure: Failure | None) -> None:
        nonlocal done
        done += 1
        if failure:
            if failure.kind not in failures:
                print(f"{failure.kind}\n    {case}", flush=True)
            failures.setdefault(failure.kind, []).append(str(case))
        if done % 100 == 0:
            speed = done / (time.monotonic() - start)
            print(f"{done} cases, {speed:.1f} a second, {len(failures)} kinds of failures", flush=True)

    search(fuzzer, count, number, see)
    fuzzer.close()
    shutil.rmtree(folder)
    failed = sum(map(len, failures.values()))
    print(f"\n{done} cases of seed {number} in {time.monotonic() - start:.0f} s, {failed} failed")
    for kind, cases in sorted(failures.items()):
        print(f"{len(cases):5} {kind}\n      make fuzz CASE='{min(cases, key=len)}'")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
