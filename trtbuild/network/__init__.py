"""The network: an ordered list of operations over named tensors."""

from trtbuild.network.network import Network, Node, Op, Tensor

__all__ = ["Network", "Node", "Op", "Tensor"]
