"""The project's own tabletop in physics: scenes, environment, tasks and oracle, chains, experts, recorder.

It follows CALVIN's contract (actions, states, task names, success rules) with furniture of its own; a score on it is
a playtable score, never a CALVIN score.
"""
