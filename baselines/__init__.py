"""One short file for each network that DiracNets are compared with; networks.py names them."""
