"""What a training or a sampling loop would take on TPUs, from compiling it without one."""
