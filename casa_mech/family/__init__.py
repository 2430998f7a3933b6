"""The map of when a gate trained on text carries over: organisms that differ in one premise, each with its gates."""
