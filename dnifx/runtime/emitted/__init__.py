"""What emitted code calls. These files import torch alone, so that an emitted folder can carry copies of them."""
