"""That no rule has the `simplify` of another one."""

# methods of a rule on which its predictions depend, beside `simplify`
PREDICTING = ("combine", "mode", "unguided", "uncond_and_cond", "streams", "cond_stream")


def check_simplify(cls: type, base: type) -> None:
    """TypeError for a rule that predicts otherwise than the one whose `simplify` it has.

    `base` has the one that all may have.
    """
    changed = [name for name in PREDICTING if name in vars(cls)]
    inherited = getattr(cls, "simplify") is not getattr(base, "simplify")  # noqa: B009
    if changed and "simplify" not in vars(cls) and inherited:
        raise TypeError(
            f"{cls.__name__}: got {changed[0]} with the simplify of another rule, "
            "expected simplify too (simplify = Guidance.simplify keeps all streams)"
        )
