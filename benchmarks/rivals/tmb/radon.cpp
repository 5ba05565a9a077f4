// Homes in counties, each with an intercept and a slope; the negative log joint density in unconstrained coordinates.
#include <TMB.hpp>

// Half-normal density of exp(log_scale) with scale 1, and the log-Jacobian of the exponential.
template <class Type>
Type log_scale_prior(Type log_scale) {
  return dnorm(exp(log_scale), Type(0), Type(1), true) + log(Type(2)) + log_scale;
}

template <class Type>
Type objective_function<Type>::operator()() {
  DATA_IVECTOR(county);  // (homes), from 0
  DATA_VECTOR(floor);
  DATA_VECTOR(log_radon);
  PARAMETER(mu_alpha);
  PARAMETER(mu_beta);
  PARAMETER(log_sigma_alpha);
  PARAMETER(log_sigma_beta);
  PARAMETER(log_sigma_y);
  PARAMETER_VECTOR(alpha);
  PARAMETER_VECTOR(beta);

  Type nll = -dnorm(mu_alpha, Type(0), Type(10), true) - dnorm(mu_beta, Type(0), Type(10), true);
  nll -= log_scale_prior(log_sigma_alpha) + log_scale_prior(log_sigma_beta) + log_scale_prior(log_sigma_y);
  nll -= dnorm(alpha, mu_alpha, exp(log_sigma_alpha), true).sum();
  nll -= dnorm(beta, mu_beta, exp(log_sigma_beta), true).sum();
  Type sigma_y = exp(log_sigma_y);
  for (int n = 0; n < log_radon.size(); n++) {
    // A slope that meets no ground floor must not enter: a product with zero would stay in the tape and in the Hessian.
    Type mean = alpha(county(n));
    if (asDouble(floor(n)) != 0) mean += beta(county(n)) * floor(n);
    nll -= dnorm(log_radon(n), mean, sigma_y, true);
  }
  return nll;
}
