"""What the units of each stage do, in the process that the GPU may take along."""
