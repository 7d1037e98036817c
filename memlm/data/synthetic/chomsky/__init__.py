"""The tasks of "Neural Networks and the Chomsky Hierarchy" (Delétang et al., 2023)."""
