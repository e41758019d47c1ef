"""The cheapest division of things into two sides (a minimum cut of a network, found with Dinic's algorithm)."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

NEVER = 1 << 30
"""A capacity that no minimum cut contains."""

_SOURCE, _SINK = 0, 1


class MinCut:
    """Things that may be chosen or not, and what combinations cost. Things are any hashable keys.

    Source of the method: E. A. Dinic, "Algorithm for solution of a problem of maximum flow in networks", 1970.
    """

    def __init__(self) -> None:
        self._index: dict[Hashable, int] = {}
        self._edges: list[list[int]] = [[], []]
        self._heads: list[int] = []
        self._capacities: list[int] = []

    def unless_chosen(self, thing: Hashable, cost: int = 1) -> None:
        """Let it cost `cost` not to choose `thing`."""
        self._edge(_SOURCE, self._node(thing), cost)

    def if_chosen(self, thing: Hashable, cost: int = 1) -> None:
        """Let it cost `cost` to choose `thing`."""
        self._edge(self._node(thing), _SINK, cost)

    def if_without(self, thing: Hashable, other: Hashable, cost: int = NEVER) -> None:
        """Let it cost `cost` to choose `thing` without `other`."""
        self._edge(self._node(thing), self._node(other), cost)

    def chosen(self) -> set[Hashable]:
        """Return the smallest choice of least cost."""
        levels = self._levels()
        while levels[_SINK] >= 0:
            positions = [0] * len(self._edges)
            while self._augment(levels, positions):
                pass
            levels = self._levels()
        return {thing for thing, node in self._index.items() if levels[node] >= 0}

    def _node(self, thing: Hashable) -> int:
        if thing not in self._index:
            self._index[thing] = len(self._edges)
            self._edges.append([])
        return self._index[thing]

    def _edge(self, tail: int, head: int, capacity: int) -> None:
        """Add an edge and its residual one; the two differ in the last bit of their index."""
        for start, end, amount in ((tail, head, capacity), (head, tail, 0)):
            self._edges[start].append(len(self._heads))
            self._heads.append(end)
            self._capacities.append(amount)

    def _levels(self) -> list[int]:
        """Return the distance of every node from the source along free capacity, -1 where there is none."""
        levels = [-1] * len(self._edges)
        levels[_SOURCE] = 0
        queue = deque([_SOURCE])
        while queue:
            node = queue.popleft()
            for edge in self._edges[node]:
                if self._capacities[edge] and levels[self._heads[edge]] < 0:
                    levels[self._heads[edge]] = levels[node] + 1
                    queue.append(self._heads[edge])
        return levels

    def _augment(self, levels: list[int], positions: list[int]) -> bool:
        """Send flow along one shortest path; `positions` are the edges not yet found useless."""
        path: list[int] = []
        node = _SOURCE
        while node != _SINK:
            edges = self._edges[node]
            if positions[node] == len(edges):
                if not path:
                    return False
                node = self._heads[path.pop() ^ 1]
                positions[node] += 1
                continue
            edge = edges[positions[node]]
            if self._capacities[edge] and levels[self._heads[edge]] == levels[node] + 1:
                path.append(edge)
                node = self._heads[edge]
            else:
                positions[node] += 1
        flow = min(self._capacities[edge] for edge in path)
        for edge in path:
            self._capacities[edge] -= flow
            self._capacities[edge ^ 1] += flow
        return True
