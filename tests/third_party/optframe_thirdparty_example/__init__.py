"""A third party's package for optframe: a small network, a pass that fuses its activation, and the op that it makes."""
