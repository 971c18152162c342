//! Volumes and the command: the format with cryptsetup as its judge, and what the verbs do to disks and keys at rest.

mod backup;
mod cli;
mod failing;
mod hosts;
mod incoming;
mod killed;
mod lifecycle;
mod luks2_crash;
mod luks2_interop;
mod nfs;
mod paths;
mod rekey;
mod resize;
mod storage;
