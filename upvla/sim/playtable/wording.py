"""What a person says to ask for a task: eleven or more ways for recordings, and one that only evaluation uses.

All sentences are this project's own. A family of tasks (one a block, a side or a lamp) shares its sentences; `{block}`,
`{side}` and the like are filled in. Words that would name the answer to another task ("light", "drawer") never appear
in a family that does not mean them, so that no instruction fits two tasks of one scene.
"""

from __future__ import annotations

from typing import NamedTuple


class Wording(NamedTuple):
    """`held_out` is never recorded with; `train` are."""

    held_out: str
    train: tuple[str, ...]


def _family(held_out: str, *train: str) -> Wording:
    return Wording(held_out, train)


_OPEN_DRAWER = _family(
    "open the drawer of the desk",
    "pull the handle to open the drawer", "take the drawer handle and pull it out", "open up the drawer",
    "the drawer should be open", "slide the drawer out towards you", "get the drawer open", "pull out the drawer",
    "please open the drawer", "draw the drawer out by its bar", "make the drawer stand open",
    "go to the drawer and open it", "open the drawer", "open the desk's drawer",
)  # fmt: skip
_CLOSE_DRAWER = _family(
    "close the drawer of the desk",
    "push the handle to close the drawer", "shove the drawer back in", "shut the drawer", "the drawer should be closed",
    "slide the drawer back into the desk", "get the drawer shut", "push the drawer in", "please close the drawer",
    "press the drawer front until it is shut", "make the drawer stand closed", "go to the drawer and close it",
    "close the drawer", "close the desk's drawer",
)  # fmt: skip
_SLIDER = _family(
    "move the sliding door to the {side} side",
    "slide the door to the {side}", "take the door handle and move it {side}", "drag the sliding door {side}wards",
    "the sliding door should be on the {side}", "push the cabinet door {side}", "move the door {side}",
    "bring the sliding door to the {side} end", "please slide the cabinet door to the {side}",
    "grab the handle of the door and go {side}", "shift the sliding door over to the {side}",
    "let the door run to its {side} stop", "move the sliding door {side}", "slide the cabinet door to the {side} side",
)  # fmt: skip
_BULB_ON = _family(
    "turn on the light bulb with the switch",
    "push the purple switch to light the bulb", "switch the bulb on", "make the yellow lamp shine",
    "the light bulb should be on", "use the switch to turn on the lamp", "flip the switch so the bulb glows",
    "move the lever to turn the bulb on", "please switch on the light bulb",
    "slide the purple switch up to the cabinet",
    "turn the yellow light on", "get the lamp to light up", "turn on the light bulb", "turn on the lamp",
    "turn the bulb on with the switch", "switch on the lamp with the purple switch",
)  # fmt: skip
_BULB_OFF = _family(
    "turn off the light bulb with the switch",
    "pull the purple switch to put out the bulb", "switch the bulb off", "make the yellow lamp go dark",
    "the light bulb should be off", "use the switch to turn off the lamp", "flip the switch so the bulb stops glowing",
    "move the lever to turn the bulb off", "please switch off the light bulb",
    "slide the purple switch back to the front",
    "turn the yellow light off", "get the lamp to go out", "turn off the light bulb", "turn off the lamp",
    "turn the bulb off with the switch", "switch off the lamp with the purple switch",
)  # fmt: skip
_LED_ON = _family(
    "turn on the green led with the button",
    "press the orange button to light the led", "push the button down", "make the green light shine",
    "the led should be on", "use the button to switch on the led", "press the button so the led glows",
    "hit the round button to turn on the green light", "please turn the led on", "light up the led",
    "tap the orange button to get green light", "put the green light on", "turn on the led", "turn on the green light",
    "turn the led on with the button", "switch on the green led with the orange button",
)  # fmt: skip
_LED_OFF = _family(
    "turn off the green led with the button",
    "press the orange button to put out the led", "push the button to end the green light",
    "make the green light go dark",
    "the led should be off", "use the button to switch off the led", "press the button so the led stops glowing",
    "hit the round button to turn off the green light", "please turn the led off", "darken the led",
    "tap the orange button to stop the green light", "put the green light out", "turn off the led",
    "turn off the green light", "turn the led off with the button", "switch off the green led with the orange button",
)  # fmt: skip
_ROTATE = _family(
    "rotate the {block} block towards the {side}",
    "turn the {block} block to the {side}", "rotate the {block} block {side}",
    "grasp the {block} block and turn it {side}",
    "twist the {block} cube to the {side}", "take the {block} block and rotate it to the {side}",
    "spin the {block} block {way}", "the {block} block should be turned {side}", "turn the {block} cube {way}",
    "please rotate the {block} block to the {side}", "give the {block} block a turn to the {side}",
    "hold the {block} block and twist it {way}",
)  # fmt: skip
_PUSH = _family(
    "push the {block} block towards the {side}",
    "slide the {block} block to the {side}", "shove the {block} block {side}", "move the {block} cube {side}wards",
    "the {block} block should be further {side}", "nudge the {block} block along to the {side} side",
    "push the {block} cube to the {side}", "drive the {block} block {side} along the table",
    "please push the {block} block {side}", "shift the {block} block some way {side}",
    "press against the {block} block so it slides {side}", "bring the {block} block over to the {side}",
)  # fmt: skip
_LIFT_TABLE = _family(
    "lift the {block} block up from the desk",
    "pick up the {block} block", "grasp the {block} block and raise it", "take the {block} block off the table",
    "the {block} block should be in the air", "grab the {block} cube and lift it", "raise the {block} block",
    "hold the {block} block above the table", "please pick the {block} block up",
    "pick the {block} block up from the table", "lift up the {block} cube", "get hold of the {block} block and lift",
)  # fmt: skip
_LIFT_SLIDER = _family(
    "lift the {block} block out of the sliding cabinet",
    "pick up the {block} block from the cabinet", "take the {block} block out of the cabinet",
    "grasp the {block} block behind the sliding door", "reach into the cabinet and lift the {block} block",
    "get the {block} cube out of the cabinet", "the {block} block should come up off the shelf",
    "grab the {block} block that lies in the cabinet", "raise the {block} block from the shelf",
    "fetch the {block} block from behind the door", "please take the {block} block from the cabinet",
    "pick the {block} cube up off the shelf",
)  # fmt: skip
_LIFT_DRAWER = _family(
    "lift the {block} block out of the drawer",
    "pick up the {block} block from the drawer", "take the {block} block out of the drawer",
    "grasp the {block} block inside the drawer", "reach into the drawer and lift the {block} block",
    "get the {block} cube out of the drawer", "the {block} block should come up from the drawer",
    "grab the {block} block that lies in the drawer", "raise the {block} block from the bottom of the drawer",
    "fetch the {block} block from the drawer", "please take the {block} block from the drawer",
    "go into the drawer and pick the {block} cube up",
)  # fmt: skip
_PLACE_SLIDER = _family(
    "place what you hold into the sliding cabinet",
    "put the grasped block in the cabinet", "set the block down in the cabinet", "store the held block behind the door",
    "place the block on the cabinet's shelf", "lay the block into the cabinet", "the held block belongs in the cabinet",
    "drop the block off in the cabinet", "put what you are holding on the shelf", "let go of the block in the cabinet",
    "please put the block into the cabinet", "move the held block into the open half of the cabinet",
)  # fmt: skip
_PLACE_DRAWER = _family(
    "place what you hold into the drawer",
    "put the grasped block in the drawer", "set the block down in the drawer",
    "store the held block in the open drawer",
    "place the block on the bottom of the drawer", "lay the block into the drawer",
    "the held block belongs in the drawer",
    "drop the block off in the drawer", "put what you are holding in the drawer", "let go of the block in the drawer",
    "please put the block into the drawer", "move the held block over the drawer and release it",
)  # fmt: skip
_PUSH_DRAWER = _family(
    "push the block so that it falls into the drawer",
    "slide the block into the drawer", "shove the block over the edge into the drawer",
    "sweep the block off the table into the drawer", "push the cube off the desk and into the drawer",
    "move the block along the table until it drops into the drawer", "the block should be pushed into the drawer",
    "drive the block over the front edge into the drawer", "nudge the block into the open drawer",
    "please push the block into the drawer", "push what lies on the table into the drawer",
    "press the block forward till it falls in the drawer",
)  # fmt: skip
_STACK = _family(
    "stack the block you hold on the other block",
    "put the grasped block on top of another block", "stack the blocks", "place the held block on the other one",
    "set the block down on top of the other", "build a tower of two blocks", "the blocks should be stacked",
    "pile one block onto the other", "put one block upon the other", "let the held block rest on the other block",
    "please stack the blocks on each other", "make a stack of the blocks",
)  # fmt: skip
_UNSTACK = _family(
    "unstack the two blocks",
    "take the top block off the other", "take the tower apart", "remove the upper block from the stack",
    "lift the upper block off the lower one", "the blocks should no longer be stacked", "pull the stacked blocks apart",
    "take down the block on top", "get the top block off the stack", "separate the stacked blocks",
    "please unstack the blocks", "undo the stack of blocks",
)  # fmt: skip

_FIXED = {
    "open_drawer": _OPEN_DRAWER, "close_drawer": _CLOSE_DRAWER,
    "turn_on_lightbulb": _BULB_ON, "turn_off_lightbulb": _BULB_OFF, "turn_on_led": _LED_ON, "turn_off_led": _LED_OFF,
    "place_in_slider": _PLACE_SLIDER, "place_in_drawer": _PLACE_DRAWER, "push_into_drawer": _PUSH_DRAWER,
    "stack_block": _STACK, "unstack_block": _UNSTACK,
}  # fmt: skip
_LIFTS = {"table": _LIFT_TABLE, "slider": _LIFT_SLIDER, "drawer": _LIFT_DRAWER}
_WAYS = {"right": "clockwise", "left": "counter-clockwise"}


def wording(task: str) -> Wording:
    """The sentences of a task by its name."""
    if task in _FIXED:
        return _FIXED[task]
    verb, block, *_, last = task.split("_")
    if verb == "move":  # move_slider_<side>
        return _filled(_SLIDER, side=last)
    if verb == "lift":
        return _filled(_LIFTS[last], block=block)
    return _filled({"rotate": _ROTATE, "push": _PUSH}[verb], block=block, side=last, way=_WAYS[last])


def _filled(family: Wording, **words: str) -> Wording:
    return Wording(family.held_out.format(**words), tuple(text.format(**words) for text in family.train))
