"""What runs on a device: the agent's shell, and the trainer it keeps as a child process.

The trainer's modules (``finetune``, ``base_model``, ``peft_adapter``, ``dataset``, ``probe``,
``peak_memory``, ``round_directory``, ``stretch``, ``onnx_runtime``, ``trainer_child``) stay valid
on Python 3.8 and import no part of the shell. Importing this package imports nothing.
"""
