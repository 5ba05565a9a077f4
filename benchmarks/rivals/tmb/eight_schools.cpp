// Eight effects with known standard errors; the negative log joint density in unconstrained coordinates.
#include <TMB.hpp>

template <class Type>
Type objective_function<Type>::operator()() {
  DATA_VECTOR(y);
  DATA_VECTOR(sigma);
  PARAMETER(mu);
  PARAMETER(log_tau);
  PARAMETER_VECTOR(theta);

  Type tau = exp(log_tau);
  // Half-Cauchy density with scale 5, and the log-Jacobian of the exponential.
  Type log_prior = log(Type(2) / (Type(5) * Type(M_PI))) - log(Type(1) + tau * tau / Type(25)) + log_tau;
  Type nll = -dnorm(mu, Type(0), Type(5), true) - log_prior;
  nll -= dnorm(theta, mu, tau, true).sum();
  for (int j = 0; j < y.size(); j++) nll -= dnorm(y(j), theta(j), sigma(j), true);
  return nll;
}
