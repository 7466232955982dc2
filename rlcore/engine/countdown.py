"""The countdown task: numbers and a target; an answer is an expression that uses every number once.

reasoning-gym makes the problems. Its verifier hands the answer to sympy's parser, which evaluates it as Python: not for
texts that a model wrote, and "9**9**9" never ends. So the check is made here, on the four operations alone.
"""

from __future__ import annotations

import ast
from fractions import Fraction
from typing import Any

# Longer texts are no answers; Python's parser would recurse as deep as they nest.
LONGEST = 200
# Python's parser also takes comments, 0xA and 1_0.
LETTERS = set("0123456789+-*/() ")
OPERATIONS = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}


def is_solution(answer: str, entry: dict[str, Any]) -> bool:
    """Whether an expression of + - * / and brackets uses exactly the entry's numbers and equals its target."""
    answer = answer.strip()
    if len(answer) > LONGEST or not LETTERS.issuperset(answer):
        return False
    try:
        used: list[int] = []
        value = evaluate(ast.parse(answer, mode="eval").body, used)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return False
    problem = entry["metadata"]
    return value == problem["target"] and sorted(used) == sorted(problem["numbers"])


def evaluate(node: ast.AST, used: list[int]) -> Fraction:
    """The exact value of an expression; appends the numbers in it to `used`. ValueError for anything else."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](evaluate(node.left, used), evaluate(node.right, used))
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    raise ValueError(f"not one of the four operations: {type(node).__name__}")


def identity(entry: dict[str, Any]) -> str:
    """The problem itself: reasoning-gym asks for it in three sentences and any order of the numbers."""
    problem = entry["metadata"]
    return f"{' '.join(map(str, sorted(problem['numbers'])))} = {problem['target']}"
