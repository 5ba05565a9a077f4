// Three Poisson counts of each unit; the negative log joint density in unconstrained coordinates.
#include <TMB.hpp>

template <class Type>
Type objective_function<Type>::operator()() {
  DATA_MATRIX(z);  // (units, 3)
  PARAMETER(mu);
  PARAMETER(log_tau);
  PARAMETER_VECTOR(y);

  Type nll = -dnorm(mu, Type(0), Type(3), true) - dnorm(log_tau, Type(0), Type(1), true);
  nll -= dnorm(y, mu, exp(log_tau), true).sum();
  double log_factorials = 0;  // a plain number, to stay out of the tape
  for (int n = 0; n < z.rows(); n++) {
    Type rate = exp(y(n));
    for (int c = 0; c < z.cols(); c++) {
      nll -= z(n, c) * y(n) - rate;
      log_factorials += std::lgamma(asDouble(z(n, c)) + 1);
    }
  }
  return nll + Type(log_factorials);
}
