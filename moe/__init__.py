"""The parts every MoE training system of the suite is built from. Knows no system by name."""
