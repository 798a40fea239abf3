"""What is done with a trained model: functions that Python users can call. The commands are in scripts/."""
