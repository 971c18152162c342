//! XTS-AES-256 over sectors: kernels, choice at run time, self-test.
