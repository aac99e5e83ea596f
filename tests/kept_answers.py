"""A function for the metric `custom` that keeps every answer that it scores."""

KEPT: list[tuple[str, str]] = []


def keep_answer(prediction: str, reference: str) -> float:
    KEPT.append((prediction, reference))
    return float(len(prediction))
