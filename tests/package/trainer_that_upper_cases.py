"""A trainer whose data pipeline changes the text: the miniature behind rows in capital letters."""

from dpocheck.miniature import MINIATURE


def louder(row):
    return {name: text.upper() if isinstance(text, str) else text for name, text in row.items()}


class Adapter:
    says = MINIATURE.says

    def train(self, probe, rows, recipe, folder):
        return MINIATURE.train(probe, {name: [louder(row) for row in held] for name, held in rows.items()}, recipe,
                               folder)  # fmt: skip
