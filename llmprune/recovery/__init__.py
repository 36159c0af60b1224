"""Training after the cut, or while cutting, in which what was removed stays removed."""
