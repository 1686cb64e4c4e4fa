"""The order in which models of similar directions stand together. It needs SciPy, of the extra `report`."""

import numpy as np

NEAR = 0.1
"""Models of one cluster are linked by an average cosine of at least this."""


def clusters_of(cosines: list[list[float]]) -> list[list[int]]:
    """Return the models in groups of similar directions, neighbours being alike. cosines: the lower triangle."""
    from scipy.cluster.hierarchy import fcluster, leaves_list, linkage
    from scipy.spatial.distance import squareform

    if len(cosines) < 3:
        return [list(range(len(cosines)))]
    distances = np.zeros((len(cosines), len(cosines)))
    for number, row in enumerate(cosines):
        distances[number, :number] = distances[:number, number] = 1 - np.array(row)
    tree = linkage(squareform(distances.clip(min=0), checks=False), "average", optimal_ordering=True)
    labels = fcluster(tree, 1 - NEAR, "distance")
    groups: dict[int, list[int]] = {}
    for leaf in leaves_list(tree).tolist():
        groups.setdefault(int(labels[leaf]), []).append(leaf)
    return list(groups.values())
