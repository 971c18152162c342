//! The command: arguments in, exit code out.

fn main() -> std::process::ExitCode {
    sealblk::cli::main()
}
