"""What a stage of training minimises: each file is one objective of the loop (`prunet.training.loop`)."""
