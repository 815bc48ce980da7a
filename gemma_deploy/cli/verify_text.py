"""The text that `verify` reads: prose, code, numbers and other scripts."""

from typing import Final

TEXT: Final = """\
A lighthouse keeper once counted the ships that passed in a single night. He made a mark for each, \
and by the morning there were forty-seven of them: eleven steamers, a handful of fishing boats, and \
the rest so far out that only their lamps could be seen. He wrote the number in his book, under the \
wind (north-west, force 5) and the height of the water, 3.82 metres.

def count_ships(marks: list[str]) -> dict[str, int]:
    totals = {}
    for mark in marks:
        totals[mark] = totals.get(mark, 0) + 1
    return totals

"What use is a number?" his daughter asked. She was nine, and questions came to her as easily as \
bread. "Nobody will ever read it." The keeper thought about that for a while. Then he said that a \
light which nobody sees is still a light, and that the sea keeps no books of its own.

Years later a student of weather found forty of those books in a cellar; from the marks she could \
tell when the herring had come, when the war had begun, and in which winter (1893, -17.5 °C) the \
harbour froze. Ein Leuchtturm erzählt nichts, er zeigt nur. Le phare ne parle pas. 灯台は静かに立っている。 \
Маяк светит всем. 🚢 She published a table with 14,610 rows, one for each night, and thanked a man \
whose name she never learned.
"""

# Other beginnings, for the rows of a batch.
OTHERS: Final = (
    "The for statement is used to iterate over the elements of a sequence, such as a string.",
    "Water boils at 100 degrees at sea level, and at 71 degrees on the highest mountain.",
    "To whom it may concern:",
)
