//! Key providers, each with its real server, as a registry opens them: all pass one suite, and say why when they cannot.

mod agent;
mod away;
mod broker;
mod certificates;
mod conformance;
mod credentials;
mod expiry;
mod kmip;
mod kmip_mock;
mod lifecycle;
mod mistakes;
mod mock;
mod native;
mod openbao;
mod ports;
mod pykmip;
mod storm;
mod tls;
mod tpm;
mod transit;
mod transit_hostile;
mod trusted;
