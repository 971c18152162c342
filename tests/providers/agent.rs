//! The agent's providers: what volumes see of them is what they see of any.

use sealblk::keys::Providers;
use sealblk::keys::RequestPurpose;

use crate::conformance;
use common::agent::Agent;

#[test]
fn native_by_the_agent_conforms() {
    let agent = Agent::new("");
    let client = agent.client(RequestPurpose::Recrypt);
    assert_eq!(client.default_name().unwrap().as_deref(), Some("native"));
    conformance::run(&*agent.provider(RequestPurpose::Recrypt));
}
