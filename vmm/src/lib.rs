//! The VMM library: machine, vCPU, memory, devices, template, clone.
