#!/usr/bin/env bash
# First training stage: Self-Forcing initialisation.
echo "error: training is not part of this version yet; see README.md, Status" >&2
exit 2
