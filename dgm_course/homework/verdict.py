"""Judge an answer: right, or what differs, or which known mistake it looks like. NumPy only: nothing of the student's runs."""

import numpy as np

from dgm_course.homework.values import Other

__all__ = ["judge", "unfinished"]


def unfinished(name: str, answers: list[dict], called: list[str]) -> str | None:
    """Why the answers of a function need no judge: it is not written yet, or it calls what it should replace; or None."""
    if called:
        return f"it calls {called[0]}, itself or through another function; this exercise asks you to write that out"
    missing = [answer.get("inside") for answer in answers if answer.get("raised") == "NotImplementedError"]
    if not missing:
        return None
    return "not implemented yet" if missing[0] == name else f"it calls {missing[0]}, which is not implemented yet"


def judge(cases: list[dict], answers: list[dict], exercise: dict) -> str | None:
    """None if every answer is right; else one sentence for the student.

    Arguments:
        cases: For each case `label`, `inputs`, `expected` and `mistakes`: the inputs by name; the reply that is right; and
            for each known mistake the reply that it gives. A reply is what `ask` returns.
        answers: The student's reply to each case. Tensors in all of them are NumPy arrays.
        exercise: `outputs`, the names of what is returned; `tolerance`; `mentions`, the words that an error message must
            hold; `mistakes`, the sentence that helps for each.
    """
    problems = [(case, answer, differs(case, answer, exercise)) for case, answer in zip(cases, answers, strict=True)]
    wrong = [(case, answer, problem) for case, answer, problem in problems if problem]
    if not wrong:
        return None
    fitting = [name for name in exercise["mistakes"] if all(looks_like(*one[:2], name, exercise) for one in wrong)]
    if fitting:  # of several, the one that gives the right answers too
        name = max(fitting, key=lambda name: sum(fits(*one[:2], name, exercise) for one in problems))
        return f"{good_part(wrong, exercise)}it looks as if {name}. {exercise['mistakes'][name]}"
    case, _, problem = wrong[0]
    return f"{problem} ({described(case)})"


def differs(case: dict, answer: dict, exercise: dict) -> str | None:
    """What is not right in the answer to one case, or None."""
    expected = case["expected"]
    if "raised" in answer:
        return wrong_error(expected, answer, exercise["mentions"])
    if "raised" in expected:
        return f"a {expected['raised']} should be raised here, but a value came back"
    names, wanted, got = exercise["outputs"], parts(expected["value"]), parts(answer["value"])
    if type(expected["value"]) is tuple and type(answer["value"]) is not tuple:
        return f"it should return a tuple ({', '.join(names)}); {describe(answer['value'])} came"
    if len(wanted) != len(got):
        return f"it should return {len(wanted)} value{'s' * (len(wanted) > 1)}, {', '.join(names)}; {len(got)} came"
    if type(answer["value"]) is tuple and type(expected["value"]) is not tuple:
        return f"it should return {names[0]} itself; a tuple with it came"
    for name, a, b in zip(names, wanted, got, strict=True):
        if problem := wrong_form(name, a, b):
            return problem
    for name, value in case["inputs"].items():
        if isinstance(value, np.ndarray) and not same(value, answer["inputs"][name]):
            return f"it changed its input {name}: work on a copy (operators that end in _ or = act in place)"
    bad = [name for name, a, b in zip(names, wanted, got, strict=True) if not close(a, b, exercise["tolerance"])]
    if bad:
        a, b = next((a, b) for name, a, b in zip(names, wanted, got, strict=True) if name == bad[0])
        return f"{good(names, bad)}{values(bad[0], a, b)}"
    return None


def wrong_error(expected: dict, answer: dict, mentions: list[str]) -> str | None:
    """What is not right in an error, or None."""
    if answer["raised"] == expected.get("raised"):
        missing = [word for word in mentions if word not in answer["message"]]
        return f"the message of the {answer['raised']} should name {', '.join(missing)}" if missing else None
    where = f" in line {answer['line']} of the function" if answer.get("line") else ""
    wanted = f"; a {expected['raised']} is what should be raised here" if "raised" in expected else ""
    return f"it raised {answer['raised']}{where}: {answer['message']}{wanted}"


def wrong_form(name: str, wanted, got) -> str | None:
    """What is not right in kind, shape, dtype or finiteness of one value, or None."""
    if not isinstance(got, np.ndarray):
        return f"{name} should be a plain tensor; {describe(got)} came"
    if got.shape != wanted.shape:
        return f"{name} has shape {got.shape}, asked is {wanted.shape}"
    if got.dtype != wanted.dtype:
        return f"{name} has dtype {got.dtype}, asked is {wanted.dtype}"
    if not np.isfinite(got).all():
        return f"{name} is not finite: {np.sum(~np.isfinite(got))} of {got.size} values are infinite or no numbers"
    return None


def looks_like(case: dict, answer: dict, mistake: str, exercise: dict) -> bool:
    """Whether the answer to a case is not right, and each part of it is right or what a known mistake gives."""
    expected, typical = case["expected"], case["mistakes"][mistake]
    if "raised" in answer or "raised" in expected or "raised" in typical:
        return answer.get("raised") != expected.get("raised") and fits(case, answer, mistake, exercise)
    right, wrong = (agree(reply["value"], answer["value"], exercise["tolerance"]) for reply in (expected, typical))
    return bool(right) and not all(right) and len(wrong) == len(right) and all(map(max, right, wrong))


def fits(case: dict, answer: dict, mistake: str, exercise: dict) -> bool:
    """Whether the answer to a case is what a known mistake gives."""
    typical = case["mistakes"][mistake]
    if "raised" in typical or "raised" in answer:
        return typical.get("raised") == answer.get("raised")
    same_parts = agree(typical["value"], answer["value"], exercise["tolerance"])
    return bool(same_parts) and all(same_parts)


def agree(a, b, tolerance: float) -> list[bool]:
    """For each part of two values whether it is close to the other; empty if they are not the same number of arrays."""
    a, b = parts(a), parts(b)
    if len(a) != len(b) or not all(isinstance(part, np.ndarray) for part in (*a, *b)):
        return []
    return [close(x, y, tolerance) for x, y in zip(a, b, strict=True)]


def good_part(wrong: list, exercise: dict) -> str:
    """ "the mean is right, the var is not: " if some of the values are right in all wrong cases, else nothing."""
    names, bad = exercise["outputs"], set()
    for case, answer, _ in wrong:
        if "raised" in answer or "raised" in case["expected"]:
            return ""
        pairs = zip(names, parts(case["expected"]["value"]), parts(answer["value"]), strict=True)
        bad |= {name for name, a, b in pairs if not close(a, b, exercise["tolerance"])}
    return good(names, [name for name in names if name in bad])


def good(names: list[str], bad: list[str]) -> str:
    fine = [name for name in names if name not in bad]
    if not fine or not bad:
        return ""
    return f"{' and '.join(fine)} {'is' if len(fine) == 1 else 'are'} right, {' and '.join(bad)} not: "


def values(name: str, wanted: np.ndarray, got: np.ndarray) -> str:
    """Which value differs most, and how many do."""
    gap = np.abs(np.asarray(wanted, float) - np.asarray(got, float))
    worst = np.unravel_index(gap.argmax(), gap.shape)
    place = f"[{', '.join(map(str, worst))}]" if worst else ""
    return f"{name}{place} is {got[worst]:.6g} and should be {wanted[worst]:.6g}, of all its values the furthest off"


def close(a: np.ndarray, b: np.ndarray, tolerance: float) -> bool:
    """Same shape and dtype, and each value equal up to the tolerance, relative to it or to the root mean square."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    finite = a[np.isfinite(a)].astype(float)
    scale = np.sqrt(np.mean(finite**2)) if finite.size else 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        return bool(np.allclose(b, a, rtol=tolerance, atol=tolerance * scale + 1e-12, equal_nan=True))


def same(a: np.ndarray, b) -> bool:
    return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def described(case: dict) -> str:
    """Which case it is, by what goes in: short lists in full, of arrays the shape and dtype."""
    words = [case["label"]]
    for name, value in case["inputs"].items():
        if isinstance(value, np.ndarray) and value.ndim == 1 and value.size <= 6 and not value.dtype == np.float32:
            words.append(
                f"{name} = {[float(f'{number:.4g}') if value.dtype.kind == 'f' else number for number in value.tolist()]}"
            )
        elif isinstance(value, np.ndarray):
            words.append(f"{name} {value.dtype} {value.shape}")
        elif isinstance(value, (str, int, float)):
            words.append(f"{name} = {value:.4g}" if isinstance(value, float) else f"{name} = {value!r}")
    return "; ".join(words)


def parts(value) -> tuple:
    return value if type(value) is tuple else (value,)


def describe(value) -> str:
    if isinstance(value, Other):
        return f"a value {value.what}" if value.what.startswith("of ") else value.what
    return "a tensor" if isinstance(value, np.ndarray) else "None" if value is None else f"a {type(value).__name__}"
