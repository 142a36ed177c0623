"""Engines: what carries values and gradients between the processes of a run.

They stand on ``torch.distributed`` (gloo) alone: ``isend`` and ``irecv`` on one process group for each direction.
"""
