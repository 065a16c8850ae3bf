"""The server next to the MQTT broker: blobs, rounds, strategies and the operator's commands."""
