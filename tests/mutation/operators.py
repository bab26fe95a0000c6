"""The changes that the mutation run makes: a choice of cosmic-ray's, and those of a careless hand that it lacks.

Replacements that Python refuses by itself (a list divided by a string) prove nothing and are left out as a kind.
"""

from collections.abc import Iterator
from typing import Any

import parso
from cosmic_ray.operators.operator import Example, Operator
from cosmic_ray.operators.provider import OperatorProvider

OF_COSMIC_RAY = (
    "ReplaceBinaryOperator_Add_Sub",
    "ReplaceBinaryOperator_Sub_Add",
    "ReplaceBinaryOperator_Mul_Div",
    "ReplaceBinaryOperator_Div_Mul",
    "ReplaceBinaryOperator_FloorDiv_Mul",
    "ReplaceBinaryOperator_Mod_Mul",
    "ReplaceBinaryOperator_Pow_Mul",
    "ReplaceBinaryOperator_BitAnd_BitOr",
    "ReplaceBinaryOperator_BitOr_BitAnd",
    "ReplaceComparisonOperator_Eq_NotEq",
    "ReplaceComparisonOperator_NotEq_Eq",
    "ReplaceComparisonOperator_Lt_LtE",
    "ReplaceComparisonOperator_Lt_GtE",
    "ReplaceComparisonOperator_LtE_Lt",
    "ReplaceComparisonOperator_Gt_GtE",
    "ReplaceComparisonOperator_Gt_LtE",
    "ReplaceComparisonOperator_GtE_Gt",
    "ReplaceComparisonOperator_Is_IsNot",
    "ReplaceComparisonOperator_IsNot_Is",
    "ReplaceUnaryOperator_USub_UAdd",
    "ReplaceUnaryOperator_Delete_Invert",
    "ReplaceUnaryOperator_Delete_Not",
    "AddNot",
    "ReplaceTrueWithFalse",
    "ReplaceFalseWithTrue",
    "ReplaceAndWithOr",
    "ReplaceOrWithAnd",
    "ReplaceBreakWithContinue",
    "ReplaceContinueWithBreak",
    "NumberReplacer",
    "ZeroIterationForLoop",
)


class DropStatement(Operator):
    """Remove a call, an augmented assignment, or an assignment to an attribute or an item. Log lines stay."""

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        if node.type == "simple_stmt" and self._has_effect(node.children[0]):
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        statement = node.children[0]
        node.children[0] = parso.parse(statement.get_first_leaf().prefix + "pass").children[0]
        return node

    @staticmethod
    def _has_effect(statement: Any) -> bool:
        if statement.type == "atom_expr":
            return not statement.get_code().strip().startswith("log.")
        if statement.type != "expr_stmt":
            return False
        target, operator = statement.children[:2]
        return (operator.type == "operator" and operator.value != "=") or target.type == "atom_expr"

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return Example("a.b()\n", "pass\n"), Example("a += 1\n", "pass\n"), Example("a[0] = 1\n", "pass\n")


class DropKeyword(Operator):
    """Remove a keyword of a call, so that its default counts."""

    CHECKS = ("encoding", "ensure_ascii", "frozen", "strict")  # what only refuses, or differs elsewhere

    def mutation_positions(self, node: Any) -> list[Any]:  # not lazily: `mutate` is called while they are counted
        return [(node.children[place].start_pos, node.children[place].end_pos) for place in self._places(node)]

    def mutate(self, node: Any, index: int) -> Any:
        place = self._places(node)[index]
        comma = place - 1 if node.type == "arglist" and place else place + 1
        for gone in sorted({place, comma} if node.type == "arglist" else {place}, reverse=True):
            if gone < len(node.children):
                del node.children[gone]
        return node

    @staticmethod
    def _places(node: Any) -> list[int]:
        if node.type not in ("arglist", "trailer"):
            return []
        return [
            place
            for place, child in enumerate(node.children)
            if child.type == "argument"
            and child.children[1].type == "operator"
            and child.children[1].value == "="
            and child.children[0].value not in DropKeyword.CHECKS
        ]

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return Example("a(b, c=1)\n", "a(b)\n"), Example("a(c=1)\n", "a()\n"), Example("a(c=1, d=2)\n", "a( d=2)\n")


class SwapArguments(Operator):
    """The first two arguments of a call change places, where that makes a difference."""

    SYMMETRIC = ("cosine_similarity", "embedding_errors", "hypot", "l1", "max", "min", "psnr", "ssim")

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        if node.type != "arglist" or any(child.type in ("argument", "operator") for child in node.children[:3:2]):
            return
        if node.parent.get_previous_sibling().get_last_leaf().value not in self.SYMMETRIC:
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        node.children[0], node.children[2] = node.children[2], node.children[0]
        return node

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (Example("a(b,c)\n", "a(c,b)\n"),)


class DropCall(Operator):
    """`x.round()` becomes `x`, for the methods of tensors that give a tensor of the same kind."""

    METHODS = ("abs", "clamp", "clamp_min", "clone", "round", "sqrt", "square", "sigmoid")

    def mutation_positions(self, node: Any) -> list[Any]:
        return [(node.children[place].start_pos, node.children[place + 1].end_pos) for place in self._places(node)]

    def mutate(self, node: Any, index: int) -> Any:
        place = self._places(node)[index]
        del node.children[place : place + 2]
        return node

    def _places(self, node: Any) -> list[int]:
        if node.type != "atom_expr":
            return []
        return [
            place
            for place, (name, call) in enumerate(zip(node.children, node.children[1:], strict=False))
            if name.type == call.type == "trailer"
            and name.children[0].value == "."
            and name.children[1].value in self.METHODS
            and call.children[0].value == "("
        ]

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (Example("a.b.round().to(c)\n", "a.b.to(c)\n"),)


class ConfuseNames(Operator):
    """One name for the one that it is easily taken for, where it is read."""

    PAIRS = (
        ("mean", "sum"),
        ("min", "max"),
        ("amin", "amax"),
        ("any", "all"),
        ("train", "heldout"),
        ("before", "after"),
        ("first", "last"),
        ("low", "high"),
        ("source", "target"),
        ("predicted", "true"),
        ("squash", "cover_crop"),
        ("width", "height"),
        ("rank", "world_size"),
        ("text", "image"),
        ("psnr", "ssim"),
        ("floor", "ceil"),
    )

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        if node.type == "name" and self._other(node.value) and not node.is_definition() and not self._is_keyword(node):
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        node.value = self._other(node.value)
        return node

    @staticmethod
    def _is_keyword(node: Any) -> bool:
        return node.parent.type == "argument" and node.parent.children[0] is node

    def _other(self, name: str) -> str | None:
        return next((pair[pair[0] == name] for pair in self.PAIRS if name in pair), None)

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return Example("a.mean()\n", "a.sum()\n"), Example("b(first)\n", "b(last)\n")


OWN = (DropStatement, DropKeyword, SwapArguments, DropCall, ConfuseNames)


def operators() -> list[Operator]:
    theirs = OperatorProvider()
    return [*(theirs[name]() for name in OF_COSMIC_RAY), *(own() for own in OWN)]
