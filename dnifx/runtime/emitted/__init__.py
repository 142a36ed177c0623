"""What emitted code calls. These files import torch and each other alone, so an emitted folder can carry copies."""
