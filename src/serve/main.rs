//! `vhost-user-sealblk`: arguments in, exit code out. `sealblk serve` executes it.

use std::alloc::System;

use zeroizing_alloc::ZeroAlloc;

/// Keys are kept in the arena, but the messages around them pass through other memory: what is freed is wiped.
#[global_allocator]
static ALLOCATOR: ZeroAlloc<System> = ZeroAlloc(System);

fn main() -> std::process::ExitCode {
    sealblk_serve::command::main()
}
