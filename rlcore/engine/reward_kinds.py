"""The kinds of reward channels: verifier, exact, math, code, regex:PATTERN, module:function."""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlcore.engine.config import RewardConfig
from rlcore.engine.errors import UserError, told
from rlcore.engine.problem import Problem
from rlcore.engine.time_limit import TimeUp, time_limit

# Seconds for one comparison of a math channel; what takes longer is no readable answer.
MATH_SECONDS = 5.0
FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
OF_BATCH = ("prompts", "responses", "answers", "entries")
OF_SAMPLE = ("prompt", "response", "answer", "entry")


@dataclass(frozen=True)
class Channel:
    """How a channel scores: one answer, or a list of them at once; exactly one of the two is there.

    In a list a ValueError may stand in place of a score: that answer has failed, for this reason.

    limited: whether the time limit of a step holds; channels with limits of their own go without.
    """

    one: Callable[[Problem, str], Any] | None = None
    batch: Callable[[Sequence[Problem], Sequence[str]], Any] | None = None
    limited: bool = True


def make(name: str, kind: str, config: RewardConfig, verify: Callable[[Problem, str], float]) -> Channel:
    """The channel of a kind; raises UserError that names the key."""
    key = f"reward.channels.{name}"
    what, _, rest = kind.partition(":")
    if kind == "verifier":
        return Channel(verify)
    if kind == "exact":
        return Channel(lambda problem, text: same_text(text, problem.answer))
    if kind == "math":
        return Channel(same_value)
    if what == "regex":
        return Channel(matcher(key, rest))
    if what == "code":
        return Channel(batch=functools.partial(run_programs, rest, config), limited=False)
    if rest:
        return user_function(key, what, rest)
    raise UserError(
        f"{key} must be verifier, exact, math, code, code:FIELD, regex:PATTERN or module:function, got {kind!r}"
    )


def normalized(text: str) -> str:
    """A text for comparisons: NFKC, without regard to case, single spaces, no full stop at the end."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).removesuffix(".").rstrip()


def same_text(text: str, answer: str) -> float:
    return float(normalized(text) == normalized(answer))


def matcher(key: str, pattern: str) -> Callable[[Problem, str], float]:
    """regex:PATTERN: 1 where the pattern is found in the response; with a group in it, where the last match's first
    group is the same text as the answer."""
    try:
        found = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise UserError(f"{key}: {pattern!r} is not a regular expression: {error}") from None
    if not pattern:
        raise UserError(f"{key}: regex: needs a pattern behind the colon")

    def score(problem: Problem, text: str) -> float:
        matches = list(found.finditer(text))
        if not matches or not found.groups:
            return float(bool(matches))
        return same_text(matches[-1][1] or "", problem.answer)

    return score


def same_value(problem: Problem, text: str) -> float:
    """math: 1 where math-verify finds the value of the answer in the response."""
    from math_verify import verify

    try:
        with time_limit(MATH_SECONDS):
            gold = parsed(problem.answer)
            # Its own timeouts are off: they use the same timer.
            return (
                float(verify(gold, parsed.__wrapped__(text), timeout_seconds=None))
                if gold
                else same_text(text, problem.answer)
            )
    except TimeUp:
        return 0.0


@functools.lru_cache(maxsize=4096)
def parsed(text: str) -> list[Any]:
    from math_verify import parse

    bare = "\\" in text and "$" not in text and "\\boxed" not in text
    return parse(f"${text}$" if bare else text, parsing_timeout=None)


def user_function(key: str, place: str, name: str) -> Channel:
    """module:function or FILE.py:function, called with those of its arguments that it names."""
    try:
        module = load_file(place) if place.endswith(".py") else load_module(place)
        function = getattr(module, name)
    except (Exception, SystemExit) as error:  # a user's module may fail in any way
        raise UserError(f"{key}: cannot load {place}:{name}: {told(error)}") from None
    if not callable(function):
        raise UserError(f"{key}: {place}:{name} is not a function")
    try:
        wanted = inspect.signature(function).parameters
    except ValueError:
        raise UserError(f"{key}: {place}:{name} does not say what it takes; write a function around it") from None
    everything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in wanted.values())
    needed = {n for n, p in wanted.items() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    if needed <= set(OF_SAMPLE) and "response" in wanted:
        known = OF_SAMPLE
    elif needed <= set(OF_BATCH) and ("responses" in wanted or everything):
        known = OF_BATCH
    else:
        raise UserError(
            f"{key}: {place}:{name} must take responses, and may take prompts, answers and entries, or one of each: "
            f"response, prompt, answer, entry; it takes {', '.join(wanted) or 'nothing'}"
        )
    names = tuple(n for n in known if everything or n in wanted)

    def entry(problem: Problem) -> dict[str, Any]:
        # A function that changes what it gets would change the problem for the rest of the run.
        return copy.deepcopy(problem.entry) if {"entry", "entries"} & {*names} else {}

    def one(problem: Problem, text: str) -> Any:
        values = dict(zip(OF_SAMPLE, (problem.prompt, text, problem.answer, entry(problem))))
        return function(**{n: values[n] for n in names})

    def batch(problems: Sequence[Problem], texts: Sequence[str]) -> Any:
        columns = ([p.prompt for p in problems], list(texts), [p.answer for p in problems], list(map(entry, problems)))
        values = dict(zip(OF_BATCH, columns))
        return function(**{n: values[n] for n in names})

    return Channel(one) if known is OF_SAMPLE else Channel(batch=batch)


def load_module(name: str) -> Any:
    """A module by name, also one in the current directory."""
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return importlib.import_module(name)


def load_file(path: str) -> Any:
    place = Path(path).expanduser()
    if not place.is_file():
        raise FileNotFoundError(f"there is no file {path!r}")
    spec = importlib.util.spec_from_file_location(f"rlcore_reward_{place.stem}", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Data classes and pickles look their module up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run_programs(
    field: str, config: RewardConfig, problems: Sequence[Problem], texts: Sequence[str]
) -> list[float | ValueError]:
    """code: 1 where the program in the response passes the tests of its problem, each in a process of its own; the
    reason where the problem has none."""
    scores: list[float | ValueError] = [0.0] * len(texts)
    rows: dict[str, list[int]] = {}  # the answers that hold one program and have the same tests
    for at, (problem, text) in enumerate(zip(problems, texts, strict=True)):
        try:
            rows.setdefault(json.dumps(job_of(problem, text, field, config)), []).append(at)
        except ValueError as error:
            scores[at] = error
    with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2, 16)) as pool:
        for same, passed in zip(rows.values(), pool.map(run_program, map(json.loads, rows)), strict=True):
            for at in same:
                scores[at] = passed
    return scores


def job_of(problem: Problem, text: str, field: str, config: RewardConfig) -> dict[str, Any]:
    """The job of sandbox.py: the last fenced block of the response, or all of it, and the tests.

    The tests stand in a field of the problem's row, or else in its answer: Python that runs after the program, or a
    list of [input, output] or {"input", "output"}.
    """
    row = problem.entry["metadata"]
    if field and field not in row:
        raise ValueError(f"no field {field!r} with tests; there are {', '.join(row)}")
    tests = row.get(field or "tests", problem.answer)
    if isinstance(tests, str) and tests.lstrip().startswith("["):
        with suppress(ValueError):
            tests = json.loads(tests)
    fenced = FENCE.findall(text)
    job = {
        "program": fenced[-1] if fenced else text,
        "seconds": config.code_seconds,
        "memory": config.code_memory * 2**20,
    }
    if isinstance(tests, str) and tests.strip():
        return {**job, "tests": tests}
    if isinstance(tests, list) and tests:
        return {**job, "cases": [case_of(case) for case in tests]}
    raise ValueError("there are no tests for the program")


def case_of(case: Any) -> list[str]:
    pair = [case.get("input"), case.get("output")] if isinstance(case, dict) else case
    if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, str) for x in pair)):
        raise ValueError("a test of a program must be a pair of texts: its input and its output")
    return pair


def run_program(job: dict[str, Any]) -> float:
    """1.0 where a job of sandbox.py passes; see there for its limits."""
    longest = 10 + 4 * job["seconds"] * len(job.get("cases", [0]))
    with tempfile.TemporaryDirectory(prefix="rlcore-", ignore_cleanup_errors=True) as place:
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(Path(__file__).with_name("sandbox.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=place, start_new_session=True,
            env={"PATH": os.defpath, "HOME": place, "TMPDIR": place, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            # A program may hold half of a surrogate pair, which is no text to any other process.
            output, _ = process.communicate(json.dumps(job).encode(), timeout=longest)
        except subprocess.TimeoutExpired:
            output = b""
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()
    return float(output == b"1")
