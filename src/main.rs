//! The command: arguments in, exit code out.

use std::alloc::System;

use zeroizing_alloc::ZeroAlloc;

/// Keys are kept in the arena, but they pass through buffers of TLS, HTTP and JSON libraries: what is freed is wiped.
#[global_allocator]
static ALLOCATOR: ZeroAlloc<System> = ZeroAlloc(System);

fn main() -> std::process::ExitCode {
    sealblk::cli::main()
}
